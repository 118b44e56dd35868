"""What only a GPU can show: reconciliation, overhead, predictions and walls, as one JSON.

Needs CUDA, transformers and nothing from a network; takes a few minutes on an H200. Each figure is
measured here and now, and one that misses its target is written down as it is. A case that fails is
written down with its error, and the others go on.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_cases import Results, attempt, forget
from gpu_models import MODELS, Step, make_step
from gpu_times import time_loops, time_watchers
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnprof
from attnprof.analysis.wall import count_needed_bytes
from attnprof.theory.devices import DEVICES

GIB = 2**30


def measure_peak(step: Step) -> int:
    """Return torch's own peak of allocated bytes over a step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak: int = torch.cuda.memory_stats()["allocated_bytes.all.peak"]
    return peak


def reconcile(tiny: bool) -> Results:
    """Compare what runs add up to with torch's counters, and the peak traced with untraced."""
    cases = [(kind, dtype) for kind in MODELS for dtype in ("fp32", "bf16", "autocast")]
    return {f"{k} {d}": attempt(reconcile_model, k, d, tiny) for k, d in cases}


def reconcile_model(kind: str, dtype: str, tiny: bool) -> Results:
    """Compare for one model."""
    length = 64 if tiny else 1024
    step = make_step(kind, length, "cuda", dtype=dtype, attention="eager", tiny=tiny)
    step()
    step()
    untraced = measure_peak(step)
    torch.cuda.reset_peak_memory_stats()
    with attnprof.trace(samples_per_second=0) as tracer:
        step()
    run = tracer.run
    peak = run.peak(device="cuda:0")
    return {
        "peak_bytes": peak.total_bytes,
        "off_bytes": {c.counter: c.difference_bytes for c in run.reconciliation()},
        "peak_moved_bytes": peak.total_bytes - untraced,
        "unattributed_share": peak.by_category().get("unattributed", 0) / peak.total_bytes,
        "by_category": peak.by_category(),
    }


def find_target() -> str:
    """Return the name under which attnprof's table has this GPU, or ``"cuda"``."""
    own = torch.cuda.get_device_name().replace(" ", "").lower()
    names = sorted((d.name for d in DEVICES), key=len, reverse=True)
    return next((n for n in names if n.split()[0].lower() in own), "cuda")


def predict(tiny: bool) -> Results:
    """Compare dry runs with what the same steps then take."""
    cases = [("gpt2", "eager", 2048), ("gpt2", "sdpa", 4096), ("llama", "sdpa", 4096)]
    return {
        f"{kind} {attention} bf16 n={length}": attempt(
            predict_model, kind, attention, 64 if tiny else length, tiny
        )
        for kind, attention, length in cases
    }


def predict_model(kind: str, attention: str, length: int, tiny: bool) -> Results:
    """Compare two steps, the first of which makes the optimizer's states."""
    make = partial(_make_for_wall, kind=kind, attention=attention, tiny=tiny)
    dry = attnprof.dry_run(make, length, target=find_target(), steps=2)
    torch.cuda.reset_peak_memory_stats()
    with attnprof.trace(samples_per_second=0) as tracer:
        step = make(length, "cuda")
        step()
        step()
    measured = _list_sizes(tracer.run)
    measured["reserved"] = torch.cuda.memory_stats()["reserved_bytes.all.peak"]
    predicted = _list_sizes(dry)
    predicted["reserved"] = dry.simulate_allocator(device="cuda:0").reserved_peak_bytes
    ratio = {name: predicted[name] / size for name, size in measured.items()}
    return {"measured_bytes": measured, "predicted_over_measured": ratio}


def _list_sizes(run: attnprof.Run) -> dict[str, int]:
    """Return the peak, and what of it tensors hold."""
    peak = run.peak(device="cuda:0")
    no_tensors = {"workspace", "unattributed", "preexisting"}
    sizes = peak.by_category().items()
    tensors = sum(size for category, size in sizes if category not in no_tensors)
    return {"tensors": tensors, "allocated": peak.total_bytes}


def _make_for_wall(seq_len: int, device: str, *, kind: str, attention: str, tiny: bool) -> Step:
    return make_step(kind, seq_len, device, attention=attention, tiny=tiny)


def find_walls(tiny: bool) -> Results:
    """Compare the longest sequence that is predicted to fit with the longest that does.

    The device is made small, so that the boundary is near.
    """
    return {f"gpt2 {a} bf16": attempt(find_wall, a, tiny) for a in ("eager", "sdpa")}


def find_wall(attention: str, tiny: bool) -> Results:
    """Find both walls by bisection."""
    make = partial(_make_for_wall, kind="gpt2", attention=attention, tiny=tiny)
    limit, grain = (GIB, 256) if tiny else (16 * GIB, 64)
    most = (2**13 if attention == "eager" else 2**15) // grain
    predicted = _bisect(most, partial(_fits_dry, make, limit, grain))
    capacity = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / capacity)
    try:
        measured = _bisect(most, partial(_fits, make, grain))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "limit_bytes": limit,
        "grain_tokens": grain,
        "predicted_tokens": predicted * grain,
        "measured_tokens": measured * grain,
    }


def _bisect(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 0 to ``most`` that fits."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits_dry(make: Callable[[int, str], Step], limit: int, grain: int, count: int) -> bool:
    run = attnprof.dry_run(make, count * grain, target=find_target(), steps=2)
    return bool(count_needed_bytes(run.attribution.allocations, limit) <= limit)


def _fits(make: Callable[[int, str], Step], grain: int, count: int) -> bool:
    try:
        step = make(count * grain, "cuda")
        step()
        step()
    except torch.OutOfMemoryError:
        return False
    finally:
        forget()
    return True


def replace_attention(tiny: bool) -> Results:
    """Compare the what-if of fused attention in an eager model with the model that has it."""
    length = 64 if tiny else 2048
    peaks, after = {}, 0
    for attention in ("eager", "sdpa"):
        forget()
        step = make_step("gpt2", length, "cuda", attention=attention, tiny=tiny)
        step()
        with attnprof.trace(samples_per_second=0) as tracer:
            step()
        peaks[attention] = tracer.run.peak(device="cuda:0").total_bytes
        if attention == "eager":
            after = tracer.run.what_if("fused_attention", device="cuda:0").after.total_bytes
        del step, tracer
    return {
        "seq_len": length,
        "measured_bytes": peaks,
        "what_if_bytes": after,
        "predicted_over_measured": after / peaks["sdpa"],
    }


KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


def attend_both_ways(name: str, length: int) -> None:
    """Run attention of 16 heads with 64 elements in bfloat16, forward and backward."""
    q, k, v = (
        torch.randn(1, 16, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    if name == "eager":
        out = (q @ k.transpose(-1, -2) * 64**-0.5).softmax(-1) @ v
    else:
        with sdpa_kernel([KERNELS[name]]):
            out = functional.scaled_dot_product_attention(q, k, v)
    out.sum().backward()


def grow(tiny: bool) -> Results:
    """Measure what attention alone takes, forward and backward, against the length.

    Q, K, V and their gradients are part of it.
    """
    results: Results = {}
    for length in (64, 128) if tiny else (1024, 2048, 4096, 8192, 16384):
        row = results[f"n={length}"] = {}
        for name in ("eager", *KERNELS):
            forget()
            attend = partial(attend_both_ways, name, length)
            attend()  # cuBLAS takes its workspace
            forget()
            before = torch.cuda.memory_allocated()
            row[name] = measure_peak(attend) - before
    return results


def main() -> int:
    """Run all parts and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="try it out: models of no size")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 1
    tiny = arguments.tiny
    parts: dict[str, Callable[[], Results]] = {
        "reconciliation": partial(reconcile, tiny),
        "time": partial(time_watchers, tiny, arguments.rounds),
        "long_loops": partial(time_loops, tiny),
        "prediction": partial(predict, tiny),
        "walls": partial(find_walls, tiny),
        "what_if": partial(replace_attention, tiny),
        "attention_alone": partial(grow, tiny),
    }
    results: Results = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "tiny": tiny,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        results[name] = attempt(part)
        print(name, json.dumps(results[name], indent=1), flush=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

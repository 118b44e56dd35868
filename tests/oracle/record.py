"""Record what torch's CUDA build decides and allocates, as data that tests compare with.

Needs no GPU (see ``stand_in.py``), but an unpacked wheel of a CUDA build for this Python, CUDA's
headers, gcc and binutils. It writes ``allocator.json``, ``sdpa.json`` and ``workspace.json``, a
record per line, beside itself::

    pip download --no-deps torch===2.13.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88
    for wheel in *.whl; do unzip -q $wheel -d unpacked; done
    python tests/oracle/record.py unpacked/torch unpacked/nvidia/cu13/include
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MIB = 2**20
ALLOCATOR_CASES = [
    ("", None),
    ("", 400 * MIB),
    ("expandable_segments:True", None),
    ("expandable_segments:True", 400 * MIB),
    ("expandable_segments:True,max_split_size_mb:40", 400 * MIB),
    ("max_split_size_mb:20", 400 * MIB),
    ("max_split_size_mb:33,max_non_split_rounding_mb:40", 600 * MIB),
    ("roundup_power2_divisions:[256:1,512:2,>:8]", None),
    ("roundup_power2_divisions:8", None),
    ("large_segment_size_mb:12,max_split_size_mb:13", 400 * MIB),
    ("large_segment_size_mb:32,expandable_segments:True", 400 * MIB),
    ("per_process_memory_fraction:0.7,garbage_collection_threshold:0.5", 1200 * MIB),
]
GPUS = {"75": (64, 40), "80": (163, 108), "86": (99, 84), "90": (227, 132), "100": (227, 148)}
GPUS |= {"120": (99, 188)}
"""Compute capability: KiB of shared memory a block can have, multiprocessors."""


def main(torch_directory: Path, cuda_headers: Path) -> None:
    """Build the stand-in and record everything."""
    from stand_in import build_stand_in, make_environment  # not importable in the other role

    with tempfile.TemporaryDirectory() as name:
        build_stand_in(torch_directory, cuda_headers, Path(name))

        def ask(what: str, question: object, conf: str = "", **settings: object) -> list[Any]:
            environment = make_environment(Path(name), torch_directory, **settings)
            answer = subprocess.run(
                [sys.executable, __file__, what],
                input=json.dumps(question),
                env=environment | {"PYTORCH_CUDA_ALLOC_CONF": conf},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            result: list[Any] = json.loads(answer.stdout.splitlines()[-1])
            return result

        write("allocator", record_allocator(ask))
        for kind, make in (("sdpa", make_sdpa_question), ("workspace", make_workspace_question)):
            write(kind, record_attention(ask, kind, make))


def write(name: str, records: Iterator[dict[str, Any]]) -> None:
    """Write a line of JSON per record."""
    lines = [json.dumps(record, separators=(",", ":")) for record in records]
    (HERE / f"{name}.json").write_text("\n".join(lines) + "\n")


def record_allocator(ask: Any) -> Iterator[dict[str, Any]]:
    """Record what is reserved and allocated after each of many requests."""
    for number, (conf, capacity) in enumerate(ALLOCATOR_CASES):
        requests = make_requests(random.Random(number))
        answers = ask("allocator", requests, conf, capacity=capacity)
        yield {"conf": conf, "capacity": capacity, "requests": requests, "answers": answers}


def record_attention(ask: Any, kind: str, make: Any) -> Iterator[dict[str, Any]]:
    """Record what is made of many calls of attention on each kind of GPU."""
    for capability, (shared_kib, multiprocessors) in GPUS.items():
        rng = random.Random(f"{kind} {capability}")
        questions = [make(rng, int(capability)) for _ in range(60)]
        settings = {"shared_bytes": shared_kib << 10, "multiprocessors": multiprocessors}
        gpu = {"capability": divmod(int(capability), 10), "multiprocessors": multiprocessors}
        for answered in ask(kind, questions, capability=capability, **settings):
            yield gpu | answered


def make_requests(rng: random.Random) -> list[str]:
    """Return allocations of all kinds of sizes on one to three streams, frees, emptied caches."""
    streams = rng.choice([1, 1, 2, 3])
    draw_size = rng.choice([draw_any_size, draw_any_size, draw_repeated_size])
    share = rng.uniform(0.5, 0.62)
    requests: list[str] = []
    live: list[int] = []
    count = 0
    for _ in range(200):
        chance = rng.random()
        if chance < 0.004:
            requests.append("e")
        elif chance < share or not live:
            requests.append(f"m {draw_size(rng)} {rng.randrange(streams)}")
            live.append(count)
            count += 1
        else:
            requests.append(f"f {live.pop(rng.randrange(len(live)) if rng.random() < 0.6 else -1)}")
    return requests


def draw_any_size(rng: random.Random) -> int:
    """Return a size from one byte to 300 MiB, often on one of the limits."""
    limits = [MIB - 511, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB - 1, 10 * MIB, 20 * MIB]
    ranges = [(1, 5000), (1, 2 * MIB), (MIB, 24 * MIB), (MIB, 24 * MIB), (10 * MIB, 300 * MIB)]
    choice = rng.randrange(7)
    return rng.choice([512, 513, *limits]) if choice > 4 else rng.randrange(*ranges[choice])


def draw_repeated_size(rng: random.Random) -> int:
    """Return one of a few sizes, so that free blocks of equal size meet."""
    return rng.choice([700, 1_000_000, 3 * MIB, 5 * MIB, 30 * MIB, 64 * MIB])


def make_sdpa_question(rng: random.Random, _: int) -> dict[str, Any]:
    """Return a call that all kernels take, changed in up to three ways, and what is switched on."""
    heads, q_len, head_dim = rng.choice([4, 8]), rng.choice([16, 128]), rng.choice([64, 128])
    call: dict[str, Any] = {"dtype": rng.choice(["bfloat16", "float16"])}
    shape = {"q": [2, heads, q_len, head_dim], "k": [2, heads, q_len, head_dim]}
    shape["v"] = shape["k"][:]
    for _ in range(rng.randrange(4)):
        change_call(rng, call, shape)
    if len(shape["q"]) == 4 and rng.random() < 0.4:
        q_len, k_len = shape["q"][2], shape["k"][2]
        masks = [(q_len, k_len), (1, k_len), (2, 1, 1, k_len), (2, heads, q_len, k_len)]
        call["mask_shape"] = list(rng.choice([*masks, (heads, q_len, k_len), (q_len, k_len + 1)]))
        call["mask_dtype"] = rng.choice(["bool", call["dtype"]])
        call["mask_requires_grad"] = call["mask_dtype"] != "bool" and rng.random() < 0.3
        call["mask_last_dim_contiguous"] = rng.random() < 0.8
    call |= {f"{name}_shape": sizes for name, sizes in shape.items()}
    backends = ["flash", "efficient", "cudnn", "math"]
    is_all = rng.random() < 0.6
    return {"call": call, "enabled": [b for b in backends if is_all or rng.random() < 0.7]}


def change_call(rng: random.Random, call: dict[str, Any], shape: dict[str, list[int]]) -> None:
    """Change one thing that some rule is about."""
    change = rng.randrange(11)
    if change == 0:
        call["dtype"] = rng.choice(["float32", "float64"])
    elif change == 1:
        call["dropout"] = rng.choice([0.1, 0.125, 0.5])
    elif change == 2:
        call["is_causal"] = True
    elif change == 3:
        call["requires_grad"] = True
    elif change == 4:
        call["last_dim_contiguous"] = False
    elif change == 5:
        shape["k"][-2] = shape["v"][-2] = rng.choice([0, 1, 100])
    elif change == 6:
        shape["q"][-2] = rng.choice([1, 100])
    elif change == 7:
        dims = [1, 4, 60, 136, 192, 200, 224, 232, 256, 264]
        shape["q"][-1] = shape["k"][-1] = shape["v"][-1] = rng.choice(dims)
    elif change == 8:
        shape["v"][-1] = rng.choice([32, 128, 256])
    elif change == 9:
        call["enable_gqa"] = rng.random() < 0.8
        shape["k"][-3] = shape["v"][-3] = rng.choice([1, 2, 3])
        shape["v"][-3] = rng.choice([shape["v"][-3], 1])
    else:
        for sizes in shape.values():
            del sizes[:-3]


def make_workspace_question(rng: random.Random, capability: int) -> dict[str, Any]:
    """Return a call that one kernel takes, and how it and the gradient lie in memory."""
    backend = rng.choice(["flash", "efficient"]) if capability >= 80 else "efficient"
    dtypes = ["float16"] + ["bfloat16"] * (capability >= 80) + ["float32"] * (backend[0] == "e")
    batch, heads = rng.choice([1, 2, 4]), rng.choice([1, 4, 8, 32])
    kv_heads = rng.choice(
        [h for h in (heads, 1, 4) if heads % h == 0 and (h == heads or backend[0] == "f")]
    )
    q_len = rng.choice([1, 1, 7, 128, 129, 300, 1000])
    k_len = rng.choice([q_len, q_len, 64, 1000, 8000])
    dims = [8, 40, 64, 80, 96, 104, 128, 160, 192, 256]
    head_dim = rng.choice(dims if backend[0] == "f" else [*dims, 512])
    v_dim = head_dim if backend[0] == "f" or rng.random() < 0.7 else rng.choice([32, 128, 256])
    no_dropout = backend[0] == "f" and head_dim > 192 and capability in (86, 120)
    call = {
        "dtype": rng.choice(dtypes),
        "q_shape": [batch, heads, q_len, head_dim],
        "k_shape": [batch, kv_heads, k_len, head_dim],
        "v_shape": [batch, kv_heads, k_len, v_dim],
        "dropout": 0.0 if no_dropout else rng.choice([0.0, 0.0, 0.5]),
    }
    layout = {f"{name}_contiguous": rng.random() < 0.7 for name in ("out", "grad")}
    if backend[0] == "e":
        layout["out_contiguous"] = True  # its output is, whatever Q is
    return {"backend": backend, "call": call, **layout, "deterministic": rng.random() < 0.15}


def answer_allocator(requests: list[str]) -> list[list[int]]:
    """Return, after each request: failed, reserved, allocated, requested, inactive split bytes."""
    import torch

    torch.cuda.init()
    blocks: list[int | None] = []
    answers = []
    for request in requests:
        command, *numbers = request.split()
        failed = 0
        if command == "m":
            blocks.append(None)
            try:
                size, stream = map(int, numbers)
                blocks[-1] = torch._C._cuda_cudaCachingAllocator_raw_alloc(size, 64 * stream)
            except torch.OutOfMemoryError:
                failed = 1
        elif command == "f":
            if (block := blocks[int(numbers[0])]) is not None:
                torch._C._cuda_cudaCachingAllocator_raw_delete(block)
        else:
            torch.cuda.empty_cache()
        stats = torch.cuda.memory_stats()
        names = ["reserved", "allocated", "requested", "inactive_split"]
        answers.append([failed, *(stats[f"{name}_bytes.all.current"] for name in names)])
    return answers


def make_tensor(sizes: list[int], dtype: str, *, dense: bool = True, grad: bool = False) -> Any:
    """Return a tensor; a transposed one if its last dimension is not to be dense."""
    import torch

    stored = sizes if dense else [*sizes[:-2], sizes[-1], sizes[-2]]
    tensor = torch.empty(stored, dtype=getattr(torch, dtype), device="cuda")
    tensor = tensor if dense else tensor.transpose(-1, -2)
    return tensor.requires_grad_(grad)


def answer_sdpa(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each call the kernel that torch chooses; None if it finds none."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    kinds = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    kinds["cudnn"] = "CUDNN_ATTENTION"
    for question in questions:
        call = question["call"]
        dense, grad = call.get("last_dim_contiguous", True), call.get("requires_grad", False)
        q, k, v = (
            make_tensor(call[f"{n}_shape"], call["dtype"], dense=dense, grad=grad)
            for n in ("q", "k", "v")
        )
        mask = None
        if "mask_shape" in call:
            mask = make_tensor(
                call["mask_shape"],
                call["mask_dtype"],
                dense=call["mask_last_dim_contiguous"],
                grad=call["mask_requires_grad"],
            )
            call["mask_last_dim_contiguous"] = mask.stride(-1) == 1
        call["last_dim_contiguous"] = all(t.stride(-1) == 1 for t in (q, k, v))
        flags = call.get("dropout", 0.0), call.get("is_causal", False)
        with sdpa_kernel([getattr(SDPBackend, kinds[name]) for name in question["enabled"]]):
            try:
                choice = torch._fused_sdp_choice(
                    q, k, v, mask, *flags, enable_gqa=call.get("enable_gqa", False)
                )
                question["answer"] = names[choice]
            except RuntimeError:
                question["answer"] = None
    return questions


def make_input(sizes: list[int], dtype: str, transposed: bool, grad: bool) -> Any:
    """Return a tensor (B, H, T, D), in memory too or as (B, T, H, D)."""
    import torch

    b, h, n, d = sizes
    dtype = getattr(torch, dtype)
    if transposed:
        tensor = torch.empty(b, n, h, d, dtype=dtype, device="cuda").transpose(1, 2)
    else:
        tensor = torch.empty(b, h, n, d, dtype=dtype, device="cuda")
    return tensor.requires_grad_(grad)


def answer_workspace(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what forward and backward held at most beside their results, in blocks of 512 bytes."""
    import torch

    history = torch.cuda.memory._record_memory_history
    kernels = {name: f"_scaled_dot_product_{name}_attention" for name in ("flash", "efficient")}

    def measure(function: Any) -> tuple[Any, int]:
        history(enabled="all", context=None, clear_history=True)
        result = function()
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
        history(enabled=None)
        live = peak = 0
        seen = set()
        for event in trace:
            size = -(-event["size"] // 512) * 512
            if event["action"] == "alloc":
                seen.add(event["addr"])
                live += size
            elif event["action"] == "free_completed" and event["addr"] in seen:
                live -= size
            peak = max(peak, live)
        return result, peak - live

    for question in questions:
        call, dtype = question["call"], question["call"]["dtype"]
        transposed = question["out_contiguous"]
        inputs = [make_input(call[f"{n}_shape"], dtype, transposed, True) for n in ("q", "k", "v")]
        kernel = getattr(torch.ops.aten, kernels[question["backend"]])
        extra = (None, True) if question["backend"] == "efficient" else ()
        torch.use_deterministic_algorithms(question["deterministic"])
        (out, *_), forward = measure(partial(kernel, *inputs, *extra, call["dropout"], False))
        out_grad = make_input(list(out.shape), dtype, question["grad_contiguous"], False)
        question["out_contiguous"] = out.transpose(1, 2).is_contiguous()
        question["grad_contiguous"] = out_grad.transpose(1, 2).is_contiguous()
        differentiate = partial(torch.autograd.grad, out, inputs, out_grad, retain_graph=True)
        question["answer"] = [forward, measure(differentiate)[1]]
    return questions


if __name__ == "__main__":
    if len(sys.argv) == 2:  # on the stand-in, asked by the other role
        answer = globals()[f"answer_{sys.argv[1]}"]
        print(json.dumps(answer(json.load(sys.stdin))))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))

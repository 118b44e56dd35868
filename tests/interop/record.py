"""Record memory snapshots that torch's own CUDA build writes, as data that tests compare with.

Needs no GPU: the build runs on the libraries that ``tests/oracle/stand_in.py`` builds, so that its
allocator, its history and its counters are torch's own, and no kernel computes anything. What else
is needed is said in ``tests/oracle/record.py``. It writes ``recorded.json`` beside itself::

    python tests/interop/record.py unpacked/torch unpacked/nvidia/cu13/include

Snapshots are kept as JSON, not as pickles, with each call stack once.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MIB = 2**20
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "operators": {"stacks": "all", "layers": 1, "steps": 1},
    "without_requests": {"options": {"skip_actions": ["free_requested"]}, "layers": 1},
    "without_stacks": {"options": {"context": None}, "layers": 1},
    "ring": {"options": {"max_entries": 300}},
    "expandable": {"layers": 1, "conf": "expandable_segments:True"},
    "rounded": {"layers": 1, "conf": "roundup_power2_divisions:4,max_split_size_mb:32"},
    "out_of_memory": {"layers": 1, "capacity": 250 * MIB},
    "out_of_memory_expandable": {
        "layers": 1,
        "capacity": 250 * MIB,
        "conf": "expandable_segments:True",
    },
}
MOST_CHARACTERS = 100
"""Of a name: the arguments of C++ functions are long, and nothing reads them."""
STATS = [
    f"{name}.all.{which}"
    for name in ("allocated_bytes", "reserved_bytes")
    for which in ("peak", "current")
]


def main(torch_directory: Path, cuda_headers: Path) -> None:
    """Build the stand-in, record every case, and write the file."""
    sys.path.insert(0, str(HERE.parent / "oracle"))
    from stand_in import build_stand_in, make_environment

    lines = []
    with tempfile.TemporaryDirectory() as name:
        build_stand_in(torch_directory, cuda_headers, Path(name))
        for case, settings in CASES.items():
            environment = make_environment(
                Path(name), torch_directory, capability=90, capacity=settings.get("capacity")
            )
            environment["PYTORCH_CUDA_ALLOC_CONF"] = settings.get("conf", "")
            answer = subprocess.run(
                [sys.executable, __file__],
                input=json.dumps(settings),
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            text = answer.stdout.splitlines()[-1].replace(str(torch_directory.parent), "lib")
            lines.append(f"{json.dumps(case)}: {text.replace(str(HERE), 'home')}")
    (HERE / "recorded.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train a small model on the stand-in and return the snapshot with torch's own counters."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

        def forward(self, x: Any) -> Any:
            b, n, d = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) / 32**0.5
            weights = functional.softmax(scores, dim=-1)
            return x + self.out((weights @ v).transpose(1, 2).reshape(b, n, d))

    def make_model() -> Any:
        layers = (Attention() for _ in range(settings.get("layers", 2)))
        return nn.Sequential(nn.Embedding(500, 128), *layers, nn.Linear(128, 500))

    before = torch.empty(3_000_001, device="cuda", dtype=torch.uint8)
    model = make_model().cuda()
    torch.cuda.reset_peak_memory_stats()
    options = {"enabled": "all", "context": "all", "max_entries": 100_000}
    options |= {"stacks": settings.get("stacks", "python")} | settings.get("options", {})
    torch.cuda.memory._record_memory_history(**options)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    held = []
    try:
        for step in range(settings.get("steps", 3)):
            tokens = torch.randint(0, 500, (4, 160 + 96 * step)).cuda()
            loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                del before
                torch.cuda.empty_cache()
        while "capacity" in settings:
            held.append(torch.empty(12 * MIB + 1, device="cuda", dtype=torch.uint8))
    except torch.OutOfMemoryError:
        pass
    snapshot = torch.cuda.memory._snapshot()
    stats = torch.cuda.memory_stats()
    return {"stats": {name: stats[name] for name in STATS}, "snapshot": share_stacks(snapshot)}


ENTRY = ("action", "addr", "size", "stream", "time_us", "frames")
"""What is kept of an entry of a trace; the rest is the same in all of them."""


def share_stacks(snapshot: dict[str, Any]) -> dict[str, Any]:
    """Write each frame and each stack once, and an entry of a trace as a list."""
    frames: dict[tuple[str, int, str], int] = {}
    stacks: dict[tuple[int, ...], int] = {}

    def number(stack: list[dict[str, Any]]) -> int:
        rows = [(f["filename"], f["line"], f["name"][:MOST_CHARACTERS]) for f in stack]
        key = tuple(frames.setdefault(row, len(frames)) for row in rows)
        return stacks.setdefault(key, len(stacks))

    def list_entry(entry: dict[str, Any]) -> list[Any]:
        own = entry | {"frames": number(entry.get("frames", []))}
        own["addr"] = own.get("addr", own.get("device_free"))
        return [own[key] for key in ENTRY]

    for segment in snapshot["segments"]:
        for place in (segment, *segment["blocks"]):
            place["frames"] = number(place["frames"])
    snapshot["device_traces"] = [list(map(list_entry, t)) for t in snapshot["device_traces"]]
    return {**snapshot, "frames": list(frames), "stacks": list(stacks)}


if __name__ == "__main__":
    if len(sys.argv) == 1:  # on the stand-in, asked by the other role
        print(json.dumps(train(json.load(sys.stdin)), separators=(",", ":")))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]))

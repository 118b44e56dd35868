"""Record traced runs with the history of torch's own CUDA allocator, as data that tests replay.

Needs no GPU: torch's CUDA build runs on the libraries that ``tests/oracle/stand_in.py`` builds, so
that allocator, autograd, dispatch and counters are torch's own, and no kernel computes anything.
Besides what ``tests/oracle/record.py`` needs, this Python has to have attnprof's dependencies and
transformers, and Triton (3.7.1, for what is compiled) has to be unpacked beside torch. It writes a
zipped run directory per program, or for each that is named, into ``recorded/`` beside itself::

    python tests/traced/record.py unpacked/torch unpacked/nvidia/cu13/include [PROGRAM ...]
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORDED = HERE / "recorded"
MIB = 2**20
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2_expandable": {"program": "gpt2", "conf": "expandable_segments:True"},
    "two_devices": {"devices": 2},
    "out_of_memory": {"capacity": 240 * MIB},
    "late_out_of_memory": {"capacity": 240 * MIB},
    "pool_out_of_memory": {"capacity": 240 * MIB},
}
"""Of programs that are not run as they are, on a large device."""


def main(torch_directory: Path, cuda_headers: Path, *wanted: str) -> None:
    """Build the stand-in and record the programs, each in a process of its own."""
    sys.path.insert(0, str(ROOT))
    from tests.oracle.stand_in import build_stand_in, make_environment
    from tests.traced.programs import COMPILED, PROGRAMS

    RECORDED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        stand_in = Path(name) / "libraries"
        stand_in.mkdir()
        build_stand_in(torch_directory, cuda_headers, stand_in)
        for case in wanted or [*PROGRAMS, *COMPILED, *SETTINGS]:
            settings = SETTINGS.get(case, {})
            environment = make_environment(
                stand_in,
                torch_directory,
                capability=80,
                capacity=settings.get("capacity"),
                devices=settings.get("devices"),
            )
            environment["PYTHONPATH"] = f"{torch_directory.parent}:{ROOT}"
            environment["PYTORCH_CUDA_ALLOC_CONF"] = settings.get("conf", "")
            environment["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/inductor"
            environment["TRITON_CACHE_DIR"] = f"{name}/triton"
            # Trying out kernels takes memory too, so that is done before anything is compared.
            untraced = [None, None] if case in COMPILED else [None]
            for directory in [*untraced, Path(name) / case]:
                subprocess.run(
                    [sys.executable, __file__, settings.get("program", case), str(directory or "")],
                    env=os.environ | environment,
                    check=True,
                )
            pack(Path(name) / case, RECORDED / f"{case}.zip")


def run_program(name: str, directory: str) -> None:
    """Run a program, traced into a directory or untraced, and keep what torch itself counts."""
    import torch

    from tests.traced import programs

    torch.manual_seed(0)
    counted = Path(tempfile.gettempdir()) / f"attnprof-untraced-{os.getppid()}"

    def trace(body: Callable[[], Any]) -> Any:
        from attnprof.capture.tracer import Tracer

        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        if not directory:
            body()
            counted.write_text(str(torch.cuda.memory_stats()["allocated_bytes.all.peak"]))
            return
        info = {
            "recorded_on": "torch's own CUDA code on stand-ins for CUDA's libraries; not on a GPU",
            "untraced_peak_bytes": int(counted.read_text()),
        }
        counted.unlink()
        with Tracer(directory, samples_per_second=0, info=info):
            body()

    try:
        getattr(programs, name)(trace)
    except torch.OutOfMemoryError:
        if not directory:
            counted.write_text("0")


def pack(directory: Path, target: Path) -> None:
    """Write a run directory into a zip file, without times or paths of its own."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(str(path.relative_to(directory)))
                content = path.read_bytes()
                if path.name == "run.json":
                    info = json.loads(content)
                    info["writer"]["command"] = ["tests/traced/record.py", target.stem]
                    content = json.dumps(info, indent=1).encode()
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    if Path(sys.argv[1]).is_dir():
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    else:  # on the stand-in, asked by the other role
        run_program(sys.argv[1], sys.argv[2])

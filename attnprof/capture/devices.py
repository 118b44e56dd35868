"""What the machine is, and how full it is while the program runs."""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from attnprof.capture.recorder import Recorder

COMMIT_SECONDS = 10.0
"""How long samples wait for a commit of the program's, which a server without requests makes none
of, before they are written down alone."""


def describe_environment() -> dict[str, Any]:
    """Return versions and devices, for run.json."""
    found = {
        "attnprof": _version("attnprof"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "transformers": _version("transformers"),
        "cpu_threads": torch.get_num_threads(),
        "host_bytes": psutil.virtual_memory().total,
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def describe_gpus() -> dict[str, Any]:
    """Return names and compute capabilities of the GPUs, if the program has used CUDA.

    Asking earlier would initialise CUDA before the program chose its devices, or forked.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # not annotated
        return {"gpus": []}
    numbers = range(torch.cuda.device_count())
    return {
        "gpus": [torch.cuda.get_device_name(number) for number in numbers],
        "compute_capabilities": [torch.cuda.get_device_capability(number) for number in numbers],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class GpuReader:
    """NVML's view of the GPUs: bytes used by this process and by everyone.

    On a machine without NVML, which is normal, it has no devices and `why_not` says why.
    """

    def __init__(self) -> None:
        """Start NVML if it is there."""
        self._handles: list[Any] = []
        self._names: dict[str, str] = {}
        self.why_not: str | None = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [
                pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
            ]
        except ImportError:
            self.why_not = "the package nvidia-ml-py is not installed"
        except pynvml.NVMLError as error:
            self.why_not = f"NVML: {error}"

    def read(self) -> list[tuple[str, int, int, int]]:
        """Return device, this process's bytes, used bytes and total bytes for every GPU.

        A device has torch's name, such as ``cuda:0``, once the program has used CUDA; before that,
        and if the program does not see it, NVML's number, as ``nvml:0``. The process's bytes are 0
        where NVML does not know it, as in a container with process numbers of its own.
        """
        rows = []
        for number, handle in enumerate(self._handles):
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                name = self._find_names().get(self._nvml.nvmlDeviceGetUUID(handle))
            except self._nvml.NVMLError:
                continue
            own = sum(p.usedGpuMemory or 0 for p in processes if p.pid == os.getpid())
            rows.append((name or f"nvml:{number}", own, int(memory.used), int(memory.total)))
        return rows

    def _find_names(self) -> dict[str, str]:
        """Return torch's names of the GPUs by UUID: CUDA_VISIBLE_DEVICES may reorder them."""
        if not self._names and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # not annotated
            for index in range(torch.cuda.device_count()):
                uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
                self._names[f"GPU-{uuid}"] = f"cuda:{index}"
        return self._names

    def close(self) -> None:
        """Shut NVML down."""
        if self.why_not is None:
            self._nvml.nvmlShutdown()


@contextmanager
def sampling(recorder: Recorder, *, per_second: float) -> Iterator[None]:
    """Sample host and GPU memory in a background thread for the time being.

    Args:
        recorder: Receives the samples.
        per_second: How often; 0 takes none.
    """
    if per_second <= 0:
        yield
        return
    stop = threading.Event()
    process = psutil.Process()
    owner = os.getpid()
    gpus = GpuReader()

    def sample() -> None:
        total = psutil.virtual_memory().total
        while True:
            now = time.perf_counter_ns()
            memory = psutil.virtual_memory()
            recorder.samples.append(
                (now, "host", process.memory_info().rss, total - memory.available, total)
            )
            recorder.samples.extend((now, *row) for row in gpus.read())
            oldest = recorder.samples[:1]
            if oldest and now - oldest[0][0] > COMMIT_SECONDS * 1e9:
                recorder.commit_samples()
            if stop.wait(min(1 / per_second, threading.TIMEOUT_MAX)):
                return

    thread = threading.Thread(target=sample, name="attnprof-sampler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        if os.getpid() == owner:  # a forked child has no such thread, and its lock may be held
            stop.set()
            thread.join()
            gpus.close()

"""What NVML says of GPUs, with a made-up NVML: no GPU needed."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from attnprof.capture.devices import GpuReader

GIB = 2**30


class Nvml(ModuleType):
    """Two GPUs, of which this process and another one use the second."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=5 * GIB * handle, total=80 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        others = SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=2 * GIB)
        ours = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * GIB)
        return [others, ours] if handle == 1 else []

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> GpuReader:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    return GpuReader()


def test_gpus_have_nvmls_numbers_before_the_program_uses_cuda(reader: GpuReader) -> None:
    assert reader.read() == [("nvml:0", 0, 0, 80 * GIB), ("nvml:1", 3 * GIB, 5 * GIB, 80 * GIB)]


def test_gpus_have_torchs_names_once_the_program_uses_cuda(
    reader: GpuReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA_VISIBLE_DEVICES=1: the program sees the second alone, as its first.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1")
    )
    assert [row[:2] for row in reader.read()] == [("nvml:0", 0), ("cuda:0", 3 * GIB)]


def test_gpu_that_does_not_answer_is_left_out(
    reader: GpuReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> SimpleNamespace:
        if handle == 0:
            raise Nvml.NVMLError("the GPU is lost")
        return SimpleNamespace(used=0, total=80 * GIB)

    monkeypatch.setattr(Nvml, "nvmlDeviceGetMemoryInfo", lambda self, handle: fail(handle))
    assert [row[0] for row in reader.read()] == ["nvml:1"]

"""What a name or a size stands for."""

import pytest

from attnprof.report.machine import Machine, describe_gpu, find_machine
from attnprof.theory.devices import DRIVER_RESERVE_BYTES, find_device

GIB = 2**30


def test_a_size_is_all_there_is() -> None:
    assert find_machine(" 80 GB ") == Machine("80 GB", 80 * 10**9, "cuda")


def test_a_device_lacks_what_its_driver_takes() -> None:
    h200 = find_device("H200")
    assert find_machine("nvidia h200") == Machine(
        "H200", h200.memory_bytes - DRIVER_RESERVE_BYTES, "H200"
    )


def test_a_gpu_has_the_memory_it_reports() -> None:
    machine = describe_gpu("NVIDIA A100-SXM4-80GB", 79 * GIB)
    assert machine.target == find_device("A100 80GB").name
    assert machine.capacity_bytes == 79 * GIB - DRIVER_RESERVE_BYTES


def test_a_gpu_that_no_table_has_is_some_cuda_device() -> None:
    assert describe_gpu("Z9000", 8 * GIB) == Machine(
        "Z9000", 8 * GIB - DRIVER_RESERVE_BYTES, "cuda"
    )


@pytest.mark.parametrize("device", ["", "X9", "80 parsecs"])
def test_what_is_neither_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"no device named|cannot read '80 parsecs' as a size"):
        find_machine(device)

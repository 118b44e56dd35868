"""Devices: found by the names people and drivers use, plausible in every row."""

import pytest

from attnprof.theory.devices import DEVICES, DRIVER_RESERVE_BYTES, Device, find_device


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("a100", "A100 80GB"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10"),
        ("AMD Instinct MI300X OAM", "MI300X"),
    ],
)
def test_names_of_people_and_drivers_are_understood(name: str, device: str) -> None:
    assert find_device(name).name == device


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_device_is_found_by_its_own_name(device: Device) -> None:
    assert find_device(device.name) is device


def test_unknown_names_get_the_nearest_and_the_list() -> None:
    message = "no device named 'h20'; did you mean H200 or .*? known are T4, .*, MI355X"
    with pytest.raises(ValueError, match=message):
        find_device("h20")


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [("A100 40GB", 40_960), ("A100 80GB", 81_920), ("H100", 81_559), ("H200", 143_771)],
)
def test_memory_is_what_the_driver_reports(name: str, mebibytes: int) -> None:
    device = find_device(name)
    assert (device.memory_bytes, device.memory_is_nominal) == (mebibytes * 2**20, False)
    assert device.available_bytes == device.memory_bytes - DRIVER_RESERVE_BYTES


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rows_are_plausible(device: Device) -> None:
    # 16-bit products per byte moved: the balance of every accelerator of the last decade
    assert 50 < device.flops_per_second / device.bandwidth_bytes_per_second < 420
    assert 2**33 < device.memory_bytes < 2**39
    assert (device.compute_capability is None) == device.name.startswith("MI")
    assert device.source

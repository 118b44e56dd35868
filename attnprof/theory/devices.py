"""What accelerators hold and how fast they are: a table, with a source for every row."""

from dataclasses import dataclass
from difflib import get_close_matches

DRIVER_RESERVE_BYTES = 2**30
"""What a program cannot have of a device's memory: the driver's own share and the CUDA context.

The driver keeps 0.4 to 0.7 GiB (an H100 of 81 559 MiB = 79.65 GiB shows up in PyTorch's
out-of-memory messages with a total capacity of 79.1 to 79.3 GiB, a B200 of 179.06 GiB with
178.35 GiB), and a context with its kernels takes a few hundred MiB more.
"""


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator."""

    name: str
    memory_bytes: int
    """All of its memory: as its driver reports it, or as advertised if `memory_is_nominal`."""
    bandwidth_bytes_per_second: int
    """Peak rate of reading or writing that memory."""
    flops_per_second: int
    """Peak of dense 16-bit matrix products with 32-bit sums, without structured sparsity."""
    compute_capability: tuple[int, int] | None
    """CUDA's (major, minor); None where there is no CUDA."""
    source: str
    """Where bandwidth and flops come from."""
    memory_is_nominal: bool = False
    """Whether `memory_bytes` was advertised (in units of 1000) rather than reported."""

    @property
    def available_bytes(self) -> int:
        """What one program can be given: `memory_bytes` less `DRIVER_RESERVE_BYTES`."""
        return self.memory_bytes - DRIVER_RESERVE_BYTES


def _device(
    name: str,
    memory: int,
    gigabytes_per_second: int,
    teraflops: float,
    capability: tuple[int, int] | None,
    source: str,
    *,
    is_nominal: bool = False,
) -> Device:
    """Return a device from the units of data sheets; memory in MiB, or if nominal in GB."""
    return Device(
        name=name,
        memory_bytes=memory * (10**9 if is_nominal else 2**20),
        bandwidth_bytes_per_second=gigabytes_per_second * 10**9,
        flops_per_second=round(teraflops * 10**12),
        compute_capability=capability,
        source=source,
        memory_is_nominal=is_nominal,
    )


# The T4's bandwidth is 256 bits at 10 Gbit/s, which some data sheets round to 300 GB/s; the B200's
# is 7680 bits at 3996 MHz, twice a cycle, advertised as 8 TB/s. Flops of GeForce cards are those of
# FP16 products with FP32 sums, which run at half the advertised rate.
DEVICES: tuple[Device, ...] = (
    _device("T4", 15_360, 320, 65, (7, 5), "NVIDIA T4 product brief"),
    _device("V100 16GB", 16_160, 900, 125, (7, 0), "NVIDIA V100 data sheet, SXM2"),
    _device("V100 32GB", 32_510, 900, 125, (7, 0), "NVIDIA V100 data sheet, SXM2"),
    _device("A10", 23_028, 600, 125, (8, 6), "NVIDIA A10 data sheet"),
    _device("L4", 23_034, 300, 121, (8, 9), "NVIDIA L4 data sheet, half of 242 (sparse)"),
    _device("L40S", 46_068, 864, 362, (8, 9), "NVIDIA L40S data sheet, half of 733 (sparse)"),
    _device("RTX 3090", 24_576, 936, 71, (8, 6), "NVIDIA GA102 whitepaper"),
    _device("RTX 4090", 24_564, 1008, 165.2, (8, 9), "NVIDIA Ada whitepaper"),
    _device("RTX 5090", 32_607, 1792, 209.5, (12, 0), "NVIDIA RTX Blackwell whitepaper"),
    _device("RTX A6000", 49_140, 768, 154.8, (8, 6), "NVIDIA A6000 data sheet, half of 309.7"),
    _device("A100 40GB", 40_960, 1555, 312, (8, 0), "NVIDIA A100 data sheet"),
    _device("A100 80GB", 81_920, 2039, 312, (8, 0), "NVIDIA A100 data sheet, SXM"),
    _device("A100 80GB PCIe", 81_920, 1935, 312, (8, 0), "NVIDIA A100 data sheet, PCIe"),
    _device("H100", 81_559, 3350, 989.4, (9, 0), "NVIDIA H100 data sheet, SXM5, half of 1979"),
    _device("H100 PCIe", 81_559, 2000, 756, (9, 0), "NVIDIA H100 data sheet, half of 1513"),
    _device("H200", 143_771, 4800, 989.4, (9, 0), "NVIDIA H200 data sheet, SXM, half of 1979"),
    _device("B200", 183_359, 7672, 2250, (10, 0), "NVIDIA HGX B200 data sheet; its driver"),
    _device("B300", 288, 8000, 2250, (10, 3), "NVIDIA HGX B300 data sheet", is_nominal=True),
    _device("MI300X", 196_592, 5300, 1307.4, None, "AMD Instinct MI300X data sheet"),
    _device("MI325X", 256, 6000, 1307.4, None, "AMD Instinct MI325X data sheet", is_nominal=True),
    _device("MI355X", 288, 8000, 2516.6, None, "AMD Instinct MI355X data sheet", is_nominal=True),
)
"""The devices known. Memory is what nvidia-smi or rocm-smi calls the total, but for nominal rows.

Rates are peaks, so that times computed from them are lower bounds.
"""

_ALIASES = {"a100": "a10080gb", "v100": "v10032gb", "h10080gb": "h100", "a10g": "a10"}
"""Names in common use for a device whose row says more; the A10G has the A10's memory."""
_NOISE = {
    "nvidia", "geforce", "tesla", "amd", "instinct",
    "sxm", "sxm2", "sxm4", "sxm5", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e",
}  # fmt: skip
"""Words in the names that drivers report, beside the device's own."""


def find_device(name: str) -> Device:
    """Return a device by name; case, spaces, dashes and the maker's name do not matter.

    Names as CUDA reports them work too: ``"NVIDIA H200"``, ``"NVIDIA A100-SXM4-80GB"``.

    Raises:
        ValueError: No device has that name.
    """
    wanted = _fold(name)
    wanted = _ALIASES.get(wanted, wanted)
    by_key = {_fold(device.name): device for device in DEVICES}
    if wanted in by_key:
        return by_key[wanted]
    known = [device.name for device in DEVICES]
    near = get_close_matches(wanted, by_key, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(by_key[key].name for key in near)}? " if near else ""
    raise ValueError(f"no device named {name!r}; {hint}known are {', '.join(known)}")


def _fold(name: str) -> str:
    """Return what distinguishes a device's name: ``"NVIDIA A100-SXM4-80GB"`` -> ``"a10080gb"``."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in _NOISE)

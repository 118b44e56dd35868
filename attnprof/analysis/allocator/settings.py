"""The allocator's options, as the environment's ``PYTORCH_CUDA_ALLOC_CONF`` gives them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

MIB = 2**20

# The constants below and the rules for options are those of torch 2.13, where they are in
# https://github.com/pytorch/pytorch/blob/v2.13.0/c10/core/AllocatorConfig.h
MIN_BLOCK_BYTES = 512
"""Every block is a multiple of this."""
SMALL_BYTES = MIB
"""The largest request that the small pool serves."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""What the small pool takes from the device at a time."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""What the large pool takes at a time for requests below `MIN_EXACT_BYTES`."""
MIN_EXACT_BYTES = 10 * MIB
"""From this size on a request gets a segment of its own size, rounded to `ROUND_BYTES`."""
ROUND_BYTES = 2 * MIB
DIVISION_INTERVALS = 16
"""Intervals of ``roundup_power2_divisions``: from 1 MiB up, one per power of two."""

_WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
        "throw_on_cudamalloc_oom",
    }
)
"""Options that torch knows and that do not change which device memory is taken."""


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """Options of the caching allocator; the defaults are torch's.

    Raises:
        ValueError: A value that torch would refuse too.
    """

    max_split_size_bytes: int | None = None
    """Blocks of this size and more are never split. None: all blocks may be."""
    max_non_split_rounding_bytes: int | None = None
    """How much larger a block that may not be split may be than what is asked of it.

    None: one large segment (``large_segment_bytes``).
    """
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    """What is taken from the device for a request between 1 and 10 MiB (unknown to torch 2.8)."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * DIVISION_INTERVALS
    """Into how many steps each power of two from 1 MiB up is divided; 0 or 1: 512-byte steps."""
    garbage_collection_threshold: float = 0.0
    """From which share of the allowed memory on old cached blocks are given back. 0: never."""
    per_process_memory_fraction: float = 1.0
    """The share of the device's memory that the allocator may take (unknown to torch 2.8 here)."""
    expandable_segments: bool = False
    """Whether one segment per stream and pool grows page by page."""

    def __post_init__(self) -> None:
        smallest = self.large_segment_bytes
        _require(smallest > MIN_EXACT_BYTES, "large_segment_bytes", smallest, "more than 10 MiB")
        for name in ("max_split_size_bytes", "max_non_split_rounding_bytes"):
            size = getattr(self, name)
            _require(
                size is None or size >= smallest,
                name,
                size,
                f"at least a segment, {smallest} bytes",
            )
        divisions = self.roundup_power2_divisions
        _require(
            len(divisions) == DIVISION_INTERVALS
            and all(_is_power_of_two_or_0(d) for d in divisions),
            "roundup_power2_divisions",
            divisions,
            f"{DIVISION_INTERVALS} powers of two (0 turns rounding off)",
        )
        threshold = self.garbage_collection_threshold
        _require(
            0 <= threshold < 1, "garbage_collection_threshold", threshold, "between 0 and 1, not 1"
        )
        fraction = self.per_process_memory_fraction
        _require(0 <= fraction <= 1, "per_process_memory_fraction", fraction, "between 0 and 1")

    @classmethod
    def parse(cls, text: str) -> "AllocatorSettings":
        """Read the text of ``PYTORCH_CUDA_ALLOC_CONF`` or ``PYTORCH_ALLOC_CONF``.

        Args:
            text: ``"key:value,key:value"``, as in
                ``"max_split_size_mb:128,expandable_segments:True"``. The empty text gives the
                defaults. Options that do not change which device memory is taken are accepted.

        Raises:
            ValueError: The text is malformed, an option is unknown, or torch refuses its value.
        """
        values: dict[str, object] = {}
        for key, value in _split(text):
            if key in _READERS:
                field, read = _READERS[key]
                values[field] = read(key, value)
            elif key == "backend":
                _require(value == "native", key, value, "native; no other backend is simulated")
            elif key not in _WITHOUT_EFFECT:
                known = ", ".join(sorted([*_READERS, "backend", *_WITHOUT_EFFECT]))
                raise ValueError(
                    f"the allocator has no option {key!r} (in {text!r}); it has: {known}"
                )
        return cls(**values)  # type: ignore[arg-type]  # each reader returns its field's type


def _split(text: str) -> Iterator[tuple[str, str]]:
    """Yield keys and values; commas inside of brackets do not separate."""
    bare = "".join(text.split())
    at = 0
    while at < len(bare):
        key, colon, rest = bare[at:].partition(":")
        if not colon or not key or "," in key:
            raise ValueError(
                f"cannot read the allocator settings {text!r} at {bare[at:]!r}; expected "
                "key:value pairs with commas between them, such as 'max_split_size_mb:128'"
            )
        is_list = rest.startswith("[")
        end = rest.find("]") + 1 if is_list else (rest + ",").find(",")
        if is_list and not end:
            raise ValueError(
                f"the allocator settings {text!r} open a list with '[' and do not close it with ']'"
            )
        yield key, rest[:end]
        if end < len(rest) and rest[end] != ",":
            raise ValueError(
                f"cannot read the allocator settings {text!r} at {rest[end:]!r}; expected a comma"
            )
        at += len(key) + 1 + end + 1


def _read_mib(key: str, value: str) -> int:
    return _read_int(key, value) * MIB


def _read_int(key: str, value: str) -> int:
    _require(value.isascii() and value.isdigit(), key, value, "a whole number")
    return int(value)


def _read_float(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(_describe(key, value, "a number")) from None


def _read_threshold(key: str, value: str) -> float:
    threshold = _read_float(key, value)
    _require(0 < threshold < 1, key, value, "between 0 and 1, neither of them")
    return threshold


def _read_bool(key: str, value: str) -> bool:
    _require(value in ("True", "False"), key, value, "True or False, so spelled")
    return value == "True"


def _read_divisions(key: str, value: str) -> tuple[int, ...]:
    """Read ``8`` or ``[256:1,512:2,>:8]``: in each interval (its start in MiB) so many steps.

    The first entry holds for the intervals below it too, ``>`` for those above the last one named.
    """
    if not value.startswith("["):
        steps = _read_int(key, value)
        _require(steps > 0 and _is_power_of_two_or_0(steps), key, value, "a power of two")
        return (steps,) * DIVISION_INTERVALS
    divisions = [0] * DIVISION_INTERVALS
    last = 0
    is_first = True
    for entry in value[1:-1].split(","):
        interval, _, text = entry.partition(":")
        steps = _read_int(key, text)
        _require(_is_power_of_two_or_0(steps), key, value, "steps that are powers of two, or 0")
        if interval == ">":
            divisions[last + 1 :] = [steps] * (DIVISION_INTERVALS - last - 1)
            continue
        start = _read_int(key, interval)
        _require(
            start > 0 and _is_power_of_two_or_0(start), key, value, "intervals at powers of two"
        )
        last = min(start.bit_length() - 1, DIVISION_INTERVALS - 1)
        if is_first:
            divisions[:last] = [steps] * last
            is_first = False
        divisions[last] = steps
    return tuple(divisions)


_READERS: dict[str, tuple[str, Callable[[str, str], object]]] = {
    "max_split_size_mb": ("max_split_size_bytes", _read_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "large_segment_size_mb": ("large_segment_bytes", _read_mib),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_threshold),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_float),
    "expandable_segments": ("expandable_segments", _read_bool),
}


def _is_power_of_two_or_0(number: int) -> bool:
    return number >= 0 and number & (number - 1) == 0


def _require(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ValueError(_describe(name, got, expected))


def _describe(name: str, got: object, expected: str) -> str:
    return f"the allocator setting {name} is {got!r}; expected {expected}"

"""Reading PYTORCH_CUDA_ALLOC_CONF, against what torch 2.13 does with the same text."""

import pytest

from attnprof.analysis.allocator import AllocatorSettings

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", AllocatorSettings()),
        ("max_split_size_mb:128", AllocatorSettings(max_split_size_bytes=128 * MIB)),
        (
            " max_split_size_mb : 20 , expandable_segments:True, ",
            AllocatorSettings(max_split_size_bytes=20 * MIB, expandable_segments=True),
        ),
        (
            "max_split_size_mb:13,large_segment_size_mb:12",
            AllocatorSettings(max_split_size_bytes=13 * MIB, large_segment_bytes=12 * MIB),
        ),
        (
            "max_non_split_rounding_mb:40",
            AllocatorSettings(max_non_split_rounding_bytes=40 * MIB),
        ),
        (
            "garbage_collection_threshold:0.8,per_process_memory_fraction:0.5",
            AllocatorSettings(garbage_collection_threshold=0.8, per_process_memory_fraction=0.5),
        ),
        ("expandable_segments:True,expandable_segments:False", AllocatorSettings()),
        ("backend:native,pinned_use_background_threads:True", AllocatorSettings()),
    ],
)
def test_settings_are_read_from_text(text: str, expected: AllocatorSettings) -> None:
    assert AllocatorSettings.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "divisions"),
    [
        ("8", (8,) * 16),
        ("[256:1,512:2,>:8]", (1,) * 9 + (2,) + (8,) * 6),
        ("[256:4,1024:2]", (4,) * 9 + (0,) + (2,) + (0,) * 5),
        ("[256:4,>:0]", (4,) * 9 + (0,) * 7),
        ("[>:4]", (0,) + (4,) * 15),
        ("[2097152:4]", (4,) * 16),  # beyond the last interval
    ],
)
def test_roundup_divisions_are_read_per_interval(text: str, divisions: tuple[int, ...]) -> None:
    settings = AllocatorSettings.parse(f"roundup_power2_divisions:{text}")
    assert settings.roundup_power2_divisions == divisions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size_mb", r"cannot read .* at 'max_split_size_mb'; expected key:value pairs"),
        ("max_split_size_mb=20", r"expected key:value pairs"),
        ("max_split_size_mb:20,,expandable_segments:True", r"at ',expandable_segments:True'"),
        (
            "max_split_size_mb:20;expandable_segments:True",
            r"'20;expandable_segments:True'; .*whole",
        ),
        ("roundup_power2_divisions:[256:1", r"open a list with '\[' and do not close it"),
        ("roundup_power2_divisions:[256:1]8", r"at '8'; expected a comma"),
        ("max_split:20", r"no option 'max_split' .*; it has: backend, expandable_segments, "),
        ("max_split_size_mb:many", r"max_split_size_mb is 'many'; expected a whole number"),
        ("max_split_size_mb:19", r"max_split_size_bytes is 19922944; expected at least a segment"),
        ("max_non_split_rounding_mb:19", r"max_non_split_rounding_bytes is 19922944"),
        ("large_segment_size_mb:10", r"large_segment_bytes is 10485760; expected more than 10 MiB"),
        ("expandable_segments:true", r"expandable_segments is 'true'; expected True or False"),
        ("garbage_collection_threshold:1.0", r"expected between 0 and 1, neither of them"),
        ("garbage_collection_threshold:0", r"expected between 0 and 1, neither of them"),
        ("garbage_collection_threshold:high", r"is 'high'; expected a number"),
        ("per_process_memory_fraction:1.5", r"is 1.5; expected between 0 and 1"),
        ("roundup_power2_divisions:3", r"is '3'; expected a power of two"),
        ("roundup_power2_divisions:0", r"is '0'; expected a power of two"),
        ("roundup_power2_divisions:[64:3]", r"steps that are powers of two, or 0"),
        ("roundup_power2_divisions:[100:2]", r"intervals at powers of two"),
        ("backend:cudaMallocAsync", r"expected native; no other backend is simulated"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocatorSettings.parse(text)


def test_settings_made_by_hand_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"expected 16 powers of two"):
        AllocatorSettings(roundup_power2_divisions=(4,))
    with pytest.raises(ValueError, match=r"garbage_collection_threshold is 1; expected"):
        AllocatorSettings(garbage_collection_threshold=1)

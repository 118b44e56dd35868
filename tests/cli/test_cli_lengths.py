"""``--seq-lens``: lists and ranges, and one line where a text is neither."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.cli.lengths import parse_seq_lens
from attnprof.errors import CommandError


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("256", [256]),
        ("256,512,1024", [256, 512, 1024]),
        (" 1K , 2k,1M ", [1024, 2048, 2**20]),
        ("256:4096:x2", [256, 512, 1024, 2048, 4096]),
        ("256:4095:x2", [256, 512, 1024, 2048]),
        ("1K:8K:X2", [1024, 2048, 4096, 8192]),
        ("100:400:x1.5", [100, 150, 225, 338]),
        ("256:1024:256", [256, 512, 768, 1024]),
        ("256:1000:256", [256, 512, 768]),
        ("512:512:x2", [512]),
        ("64,128:512:x2,1K", [64, 128, 256, 512, 1024]),
        ("1.5K", [1536]),
    ],
)
def test_lengths_are_read(text: str, lengths: list[int]) -> None:
    assert parse_seq_lens(text) == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no lengths in --seq-lens; expected a list such as '256,512,1K', or"),
        ("  ", "no lengths in --seq-lens"),
        ("0", "a sequence length must be a whole number from 1 on, got '0'"),
        ("-1", "cannot read '-1' as a sequence length"),
        ("nan", "cannot read 'nan' as a sequence length"),
        ("inf", "cannot read 'inf' as a sequence length"),
        ("1.5", "a sequence length must be a whole number from 1 on, got '1.5'"),
        ("256,,512", "cannot read '' in --seq-lens '256,,512'; expected a list"),
        ("256:512", "cannot read '256:512' in --seq-lens '256:512'; expected a list"),
        ("256::x2", "cannot read '256::x2'"),
        ("256,256", "--seq-lens '256,256' has 256 twice; give each length once"),
        ("512,256", "--seq-lens '512,256' has 256 after 512; give each length once, the shortest"),
        ("4096:256:x2", "--seq-lens '4096:256:x2' ends at 256, before it begins at 4096"),
        ("256:4096:x1", "cannot multiply by '1' in --seq-lens '256:4096:x1'"),
        ("256:4096:xnan", "cannot multiply by 'nan'"),
        ("256:4096:x", "cannot multiply by ''"),
        ("256:4096:0", "a sequence length must be a whole number from 1 on, got '0'"),
        ("1:1M:1", "--seq-lens '1:1M:1' asks for 1048576 lengths; expected at most 1000"),
        ("1:2:x1.0000001", "asks for "),
    ],
)
def test_what_cannot_be_read_says_so(text: str, message: str) -> None:
    with pytest.raises(CommandError) as raised:
        parse_seq_lens(text)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.text(alphabet="0123456789xKM:,. ", max_size=12))
def test_whatever_is_read_rises(text: str) -> None:
    try:
        lengths = parse_seq_lens(text)
    except CommandError:
        return
    assert lengths
    assert lengths == sorted(set(lengths))
    assert lengths[0] >= 1


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(2, 10))
def test_a_factor_stays_within_its_range(first: int, more: int, factor: int) -> None:
    lengths = parse_seq_lens(f"{first}:{first + more}:x{factor}")
    assert lengths[0] == first
    assert lengths[-1] <= first + more < lengths[-1] * factor

"""Files from anywhere: what is plain data loads, and everything else is refused in one line."""

import gzip
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnprof.errors import SnapshotError
from attnprof.interop.opcodes import check_opcodes
from attnprof.interop.unpickle import load_plain
from tests.interop.recordings import write_pickle

HEADER = b"\x80\x04"
KIB, MIB = 2**10, 2**20


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def refuse(path: Path, match: str) -> str:
    """Check that a file is refused in one line of text that names it, and return the line."""
    with pytest.raises(SnapshotError, match=match) as caught:
        load_plain(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def load_or_refuse(path: Path) -> None:
    """Load a file, which may only fail with an error that is one line."""
    line = ""
    try:
        load_plain(path)
    except SnapshotError as error:
        line = str(error)
    assert "\n" not in line


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=30,
)


@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_loads_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, value: object, protocol: int
) -> None:
    path = tmp_path_factory.mktemp("plain") / "value.pickle"
    assert load_plain(write_pickle(path, value, protocol=protocol)) == value


def test_many_frames_load_as_they_are(tmp_path: Path) -> None:
    # Some 100 frames of 64 KiB, so that they are followed side by side.
    value = [
        {"addr": 2**40 + i, "pool_id": (i, 0), "name": f"function {i}"} for i in range(120_000)
    ]
    path = write_pickle(tmp_path / "many.pickle", value)
    assert path.stat().st_size > 40 * 64 * KIB
    assert load_plain(path) == value


def test_long_text_outside_of_frames_loads(tmp_path: Path) -> None:
    value = {"text": "x" * 300_000, "more": ["y" * 70_000, 1]}
    assert load_plain(write_pickle(tmp_path / "long.pickle", value)) == value


def test_gzipped_file_loads(tmp_path: Path) -> None:
    value = {"segments": [1, 2, 3]}
    path = write(tmp_path / "s.pickle.gz", gzip.compress(pickle.dumps(value)))
    assert load_plain(path) == value


@pytest.mark.parametrize("function", [os.system, print, eval, exec, open, getattr])
@pytest.mark.parametrize("protocol", [2, 4])
def test_function_call_is_refused_and_does_not_happen(
    tmp_path: Path, function: Callable[..., object], protocol: int
) -> None:
    mark = tmp_path / "mark"
    value = {"segments": [], "device_traces": [Calls(function, f"touch {mark}")]}
    path = write_pickle(tmp_path / "evil.pickle", value, protocol=protocol)
    line = refuse(path, "is refused: at byte")
    assert "GLOBAL" in line
    assert not mark.exists()


def test_function_call_among_many_frames_is_refused(tmp_path: Path) -> None:
    value: list[object] = [{"addr": 2**40 + i} for i in range(200_000)]
    value.insert(150_000, Calls(os.system, "true"))
    refuse(write_pickle(tmp_path / "evil.pickle", value), "GLOBAL")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("PERSID", b"Pelsewhere\n."),
        ("BINPERSID", b"K\x01Q."),
        ("INST", b"(ios\nsystem\n."),
        ("EXT1", b"\x82\x01."),
        ("BUILD", b"]}b."),
        ("REDUCE", b"K\x01)R."),
        ("NEWOBJ", b"K\x01)\x81."),
        ("DUP", b"]2."),
        ("POP", b"]0."),
        ("LONG", b"L" + b"9" * 100 + b"L\n."),
        ("BYTEARRAY8", b"\x96" + struct.pack("<Q", 2**62) + b"."),
        ("FROZENSET", b"(\x91."),
        ("0xff, which is no opcode", b"\xff."),
    ],
)
def test_opcode_that_plain_data_does_not_need_is_refused(
    tmp_path: Path, name: str, body: bytes
) -> None:
    refuse(write(tmp_path / "odd.pickle", HEADER + body), f"it holds .*{name}")


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("cut off", b"X" + struct.pack("<I", 2**32 - 1) + b"abc."),
        ("cut off", b"\x95" + struct.pack("<Q", 100) + b"]."),
        ("a frame of more than 1 MiB", b"\x95" + struct.pack("<Q", 2**40) + b"]."),
        ("more than 64 bits", b"\x8a\xff" + b"\x01" * 255 + b"."),
        ("a memo entry far beyond", b"]r" + struct.pack("<I", 2**32 - 1) + b"."),
    ],
)
def test_absurd_sizes_are_refused(tmp_path: Path, what: str, body: bytes) -> None:
    refuse(write(tmp_path / "absurd.pickle", HEADER + body), what)


def test_nested_tuples_are_refused(tmp_path: Path) -> None:
    # As the key of a dict, 200 000 levels of them would exhaust the stack of the interpreter.
    nested = b"K\x01K\x02" + b"\x86\x94K\x02" * 200_000
    refuse(write(tmp_path / "nest.pickle", HEADER + nested + b"."), "a tuple of something other")


def test_nested_tuples_that_hide_behind_frames_are_refused(tmp_path: Path) -> None:
    frames = [b"K\x01K\x02", *[b"\x86\x94K\x02"] * 10_001]
    body = b"".join(b"\x95" + struct.pack("<Q", len(frame)) + frame for frame in frames)
    refuse(write(tmp_path / "nest.pickle", HEADER + body + b"."), "a tuple of something other")


def test_pair_whose_numbers_are_in_the_frame_before_loads(tmp_path: Path) -> None:
    frames = [b"K\x01K\x02", b"\x86."]
    body = b"".join(b"\x95" + struct.pack("<Q", len(frame)) + frame for frame in frames)
    assert load_plain(write(tmp_path / "pair.pickle", HEADER + body)) == (1, 2)


def test_bomb_of_shared_lists_costs_no_more_than_its_size(tmp_path: Path) -> None:
    value: list[object] = []
    for _ in range(60):
        value = [value] * 10  # 10**60 elements, if anything walked them
    assert len(load_plain(write_pickle(tmp_path / "shared.pickle", value))) == 10


def test_file_that_needs_more_memory_than_there_is_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 3 * MIB

    monkeypatch.setattr("attnprof.interop.unpickle.psutil.virtual_memory", Memory)
    path = write_pickle(tmp_path / "wide.pickle", [{} for _ in range(10_000)])
    line = refuse(path, r"need about [34]\.\d MiB of memory, and 3.0 MiB are available")
    assert "max_entries" in line


def frame(content: bytes) -> bytes:
    return b"\x95" + struct.pack("<Q", len(content)) + content


def repeat(content: bytes, count: int) -> bytes:
    """Return opcodes many times over, in frames of 1000."""
    return frame(content * 1000) * (count // 1000)


COUNT = 200_000


@pytest.mark.parametrize(
    ("body", "least_bytes"),
    [
        # On the stack, in a slice of it and in the list: three places of 8 bytes each.
        (b"](" + repeat(b"N", COUNT) + b"e.", 24 * COUNT),
        (b"](" + repeat(b"K\x01", COUNT) + b"e.", 24 * COUNT),
        (b"]\x94(" + repeat(b"h\x00", COUNT) + b"e.", 24 * COUNT),
        (b"](" + repeat(b"G" + b"\x01" * 8, COUNT) + b"e.", (24 + 32) * COUNT),
        (repeat(b"(", COUNT) + b".", 8 * COUNT),
        # The memo becomes twice as long as the highest index, which may come first.
        (
            b"X" + struct.pack("<I", COUNT) + b"a" * COUNT + b"r" + struct.pack("<I", COUNT) + b".",
            (1 + 2 * 8) * COUNT,
        ),
        # One sign of four bytes, and all others have as many.
        (b"X" + struct.pack("<I", COUNT + 4) + b"a" * COUNT + "😀".encode() + b".", 4 * COUNT),
    ],
    ids=["none", "small integers", "memo reads", "floats", "marks", "memo index", "wide text"],
)
def test_memory_is_estimated_for_what_costs_little_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, least_bytes: int
) -> None:
    class Memory:
        available = least_bytes - 1

    path = write(tmp_path / "dense.pickle", HEADER + body)
    monkeypatch.setattr("attnprof.interop.unpickle.psutil.virtual_memory", Memory)
    refuse(path, "need about .* are available")


def test_estimate_of_a_plain_file_is_no_multiple_of_what_it_takes(tmp_path: Path) -> None:
    value = [{"addr": 2**40 + i, "size": 512, "frames": [1, 2]} for i in range(20_000)]
    content = np.frombuffer(pickle.dumps(value, protocol=4), np.uint8)
    tracemalloc.start()
    loaded = load_plain(write_pickle(tmp_path / "plain.pickle", value))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded == value
    assert taken < check_opcodes(content, "plain") < 3 * taken


def test_frames_of_a_byte_cost_little_to_check(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.pickle", HEADER + frame(b"N") * COUNT + b".")
    tracemalloc.start()
    load_or_refuse(path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 4 * path.stat().st_size


def test_gzip_bomb_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b"\x00" * (64 * MIB))
    refuse(write(tmp_path / "bomb.pickle.gz", packed), "unpacks to more than 100 times")


@pytest.mark.parametrize("keep", [3, 50, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    whole = pickle.dumps([{"addr": i, "name": f"f{i}"} for i in range(5000)], protocol=4)
    part = whole[: int(keep if keep > 1 else keep * len(whole))]
    refuse(write(tmp_path / "part.pickle", part), "cut off")


def test_truncated_gzip_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(pickle.dumps(os.urandom(10_000).hex()))
    refuse(write(tmp_path / "part.gz", packed[: len(packed) // 2]), "not whole gzip data")


@given(st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "any.pickle", HEADER + body)
    load_or_refuse(path)


@given(st.data())
def test_damaged_file_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(pickle.dumps([{"a": i, "b": (i, 0), "c": "x" * i} for i in range(20)], 4))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(2, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("bad") / "bad.pickle", bytes(whole))
    load_or_refuse(path)


@pytest.mark.parametrize(
    "content", [b"{}", b"PK\x03\x04 a zip", b"\x89PNG\r\n", b'{"segments": []}']
)
def test_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    refuse(write(tmp_path / "other", content), "it is not a pickle; expected a file that")


def test_empty_file_is_refused(tmp_path: Path) -> None:
    refuse(write(tmp_path / "empty.pickle", b""), "the file is empty")


def test_directory_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "it is a directory")

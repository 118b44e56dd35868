"""What a pickle would do, found out without doing it: a pass over its opcodes.

A pickle is a program. Before any of it runs, every opcode is held against the closed list that
plain data needs, so that what calls functions, declares absurd sizes or nests without end is
refused with its place in the file, whatever the interpreter's own unpickler would make of it.

Picklers since protocol 4 cut their output into frames of some 64 KiB, each of which begins with an
opcode. Thousands of frames are followed side by side, one numpy operation for all of them.
"""

import pickletools
from array import array

import numpy as np

from attnprof.errors import SnapshotError

Array = np.ndarray

_CODES = {op.name: ord(op.code) for op in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}

_ARGUMENT_BYTES = {
    "PROTO": 1, "FRAME": 8, "STOP": 0,
    "NONE": 0, "NEWTRUE": 0, "NEWFALSE": 0,
    "BININT": 4, "BININT1": 1, "BININT2": 2, "LONG1": 1, "BINFLOAT": 8,
    "SHORT_BINUNICODE": 1, "BINUNICODE": 4,
    "MARK": 0, "EMPTY_DICT": 0, "SETITEM": 0, "SETITEMS": 0,
    "EMPTY_LIST": 0, "APPEND": 0, "APPENDS": 0, "EMPTY_TUPLE": 0, "TUPLE2": 0,
    "MEMOIZE": 0, "BINPUT": 1, "LONG_BINPUT": 4, "BINGET": 1, "LONG_BINGET": 4,
}  # fmt: skip
"""The opcodes that plain data needs, and how many bytes of arguments follow each.

Of LONG1 and texts these say how many more bytes follow. Pairs of numbers (pool ids) are the only
tuples: nested ones can exhaust the interpreter's stack when they are hashed.
"""
_NUMBERS = (
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
)  # fmt: skip
_PLACE_BYTES = 24
"""What CPython takes for a value where many are put into one list: its place on the unpickler's
stack, in the slice of it that is put into the list, and in the list.
"""
_OBJECT_BYTES = {
    "NONE": 0, "NEWTRUE": 0, "NEWFALSE": 0, "BININT1": 0, "BINGET": 0, "LONG_BINGET": 0,
    "BININT": 32, "BININT2": 32, "LONG1": 48, "BINFLOAT": 32,
    "SHORT_BINUNICODE": 64, "BINUNICODE": 64, "EMPTY_DICT": 360, "EMPTY_LIST": 100, "TUPLE2": 72,
}  # fmt: skip
"""About what CPython takes for the object of an opcode that has a place among others."""
_MEMO_BYTES = 16
"""Of each entry up to the highest: CPython makes the table twice as long as it has to be."""
_MARK_BYTES = 16
_TEXT_BYTES = 4
"""Of each byte of a text: one sign beyond Unicode's first plane makes all of them so wide."""

_FRAME, _STOP, _TUPLE2 = _CODES["FRAME"], _CODES["STOP"], _CODES["TUPLE2"]
_LONG1, _SHORT_TEXT, _TEXT = _CODES["LONG1"], _CODES["SHORT_BINUNICODE"], _CODES["BINUNICODE"]
_LONG_BINPUT = _CODES["LONG_BINPUT"]

_LONGEST_INT_BYTES = 9
"""Of LONG1: addresses and times are 64-bit numbers; unsigned ones have one more byte."""
_LONGEST_FRAME_BYTES = 1 << 20
"""Picklers close a frame once it holds 64 KiB, and write longer texts outside of frames."""
_FRAME_HEADER_BYTES = 9
_UNKNOWN = 0
"""Stands for an opcode of the frame before; no opcode has this code."""
_MOST_UNSURE_PAIRS = 10_000
"""Pairs whose numbers may be in the frame before, so that it stays open what they hold.

Of 64 KiB frames some 7 % begin like that. Nested tuples must all begin a frame to pass as such, and
ten thousand of them fit on any stack.
"""
_FEW_FRAMES = 32
"""Below this, following them one after the other is faster."""
_LANES = 4096
"""Frames that are followed side by side."""


def check_opcodes(data: Array, name: str) -> int:
    """Go through all opcodes of a pickle and return about how many bytes its objects will take.

    Args:
        data: The bytes of the whole file.
        name: What errors call it.

    Raises:
        SnapshotError: It is no pickle, is cut off, or holds what plain data does not need.
    """
    if len(data) < 3 or data[0] != _CODES["PROTO"] or not 2 <= data[1] <= 5:
        raise SnapshotError(
            f"cannot read {name}: it is not a pickle; expected a file that "
            "torch.cuda.memory._dump_snapshot() wrote, as it is or gzipped"
        )
    check = _Check(np.asarray(data), name)
    check.run()
    return check.estimate_bytes()


class _Check:
    """One pass over a file. Stretches are frames and single opcodes between them, in order."""

    def __init__(self, data: Array, name: str) -> None:
        self.counts = np.zeros(256, np.int64)
        """How often each opcode occurs."""
        self._data = data
        self._name = name
        self._width = np.zeros(256, np.int64)
        """Bytes of an opcode with its fixed arguments; 0 where it is refused."""
        for op, argument_bytes in _ARGUMENT_BYTES.items():
            self._width[_CODES[op]] = 1 + argument_bytes
        self._is_number = np.zeros(256, np.bool_)
        self._is_number[[_CODES[op] for op in _NUMBERS]] = True
        self._is_number[_UNKNOWN] = True
        self._unsure_pairs = 0
        self._most_entries = 0
        """How long the memo has to be for the entries that have numbers of four bytes."""
        self._has_length = np.zeros(256, np.bool_)
        self._has_length[[_LONG1, _SHORT_TEXT]] = True
        """Opcodes whose first argument says how many bytes follow it."""
        self._longest = np.full(256, 255, np.uint8)
        self._longest[_LONG1] = _LONGEST_INT_BYTES
        """How many there may be."""
        self._is_rare = self._width == 0
        self._is_rare[[_TEXT, _LONG_BINPUT]] = True
        self._is_special = self._has_length | self._is_rare
        self._is_special[_TUPLE2] = True
        """Opcodes that need a closer look: at their arguments, or at what came before."""

    def run(self) -> None:
        """Follow the file from its first opcode to its last."""
        size = len(self._data)
        # Not tuples: a frame may be a byte long, and there may be millions.
        begins, ends = array("q"), array("q")
        before = (_STOP, _STOP)  # the two opcodes last seen
        at = 0
        while at < size:
            code = int(self._data[at])
            if code == _FRAME:
                end = at + _FRAME_HEADER_BYTES + self._read_number(at + 1, 8)
                if end - at > _LONGEST_FRAME_BYTES:
                    raise self._refuse_size(at, "a frame of more than 1 MiB")
                if end > size:
                    raise self._cut_off()
                begins.append(at + _FRAME_HEADER_BYTES)
                ends.append(end)
                before = (_UNKNOWN, _UNKNOWN)
                at = end
                continue
            at = self._step(at, code, before)
            if code == _STOP:
                break
            before = (before[1], code)
        if len(begins) < _FEW_FRAMES:
            for frame in zip(begins, ends, strict=True):
                self._walk(*frame)
        else:
            for first in range(0, len(begins), _LANES):
                lanes = slice(first, first + _LANES)
                self._follow(np.array(begins[lanes]), np.array(ends[lanes]))
        if not self.counts[_STOP]:
            raise self._cut_off()

    def estimate_bytes(self) -> int:
        """Return about how many bytes the objects of the file will take."""
        count = {name: int(self.counts[code]) for name, code in _CODES.items()}
        made = sum(count[op] * (size + _PLACE_BYTES) for op, size in _OBJECT_BYTES.items())
        # An entry without a number of its own gets the number of entries before it.
        entries = max(self._most_entries, count["MEMOIZE"] + count["BINPUT"])
        # What is no opcode and no argument of fixed width is text, frames' headers apart.
        text_bytes = len(self._data) - int(self.counts @ self._width)
        return made + entries * _MEMO_BYTES + count["MARK"] * _MARK_BYTES + text_bytes * _TEXT_BYTES

    def _walk(self, at: int, end: int) -> None:
        """Follow one frame opcode by opcode."""
        before = (_UNKNOWN, _UNKNOWN)
        while at < end:
            code = int(self._data[at])
            at = self._step(at, code, before)
            before = (before[1], code)
        if at > end:
            raise self._cut_off()

    def _step(self, at: int, code: int, before: tuple[int, int]) -> int:
        """Check the opcode at ``at`` and return where the next one is."""
        width = int(self._width[code])
        if self._is_special[code]:
            place = np.array([at])
            width += int(self._measure(np.array([code]), place)[0])
            if code == _TUPLE2:
                self._check_pairs(place, np.array([before]))
        if at + width > len(self._data):
            raise self._cut_off()
        self.counts[code] += 1
        return at + width

    def _follow(self, at: Array, end: Array) -> None:
        """Follow frames side by side, each from its first opcode to its end."""
        newest = older = np.full(len(at), _UNKNOWN, np.uint8)  # the opcodes before
        seen: list[Array] = []
        while len(at):
            codes = self._data[at]
            seen.append(codes)
            width = self._width[codes]
            special = np.flatnonzero(self._is_special[codes])
            if len(special):
                own = codes[special]
                width[special] += self._measure(own, at[special])
                if len(pairs := special[own == _TUPLE2]):
                    before = np.stack([older[pairs], newest[pairs]], axis=1)
                    self._check_pairs(at[pairs], before)
            at = at + width
            newest, older = codes, newest
            going = at < end
            if not going.all():
                if (at > end).any():
                    raise self._cut_off()
                at, end, newest, older = at[going], end[going], newest[going], older[going]
            if len(seen) == _LANES:
                self._count(seen)
        self._count(seen)

    def _count(self, seen: list[Array]) -> None:
        if seen:
            self.counts += np.bincount(np.concatenate(seen), minlength=256)
            seen.clear()

    def _measure(self, codes: Array, at: Array) -> Array:
        """Return how many more bytes opcodes have than their fixed arguments, if all is well."""
        more: Array = self._data.take(at + 1, mode="clip") * self._has_length[codes]
        too_long = more > self._longest[codes]
        if too_long.any():
            raise self._refuse_size(int(at[too_long][0]), "an integer of more than 64 bits")
        rare = np.flatnonzero(self._is_rare[codes])
        if not len(rare):
            return more
        more = more.astype(np.int64)
        for place in rare.tolist():
            more[place] = self._measure_rare(int(codes[place]), int(at[place]))
        return more

    def _measure_rare(self, code: int, at: int) -> int:
        if not self._width[code]:
            raise self._refuse(at, code)
        number = self._read_number(at + 1, 4)
        if code == _TEXT:
            return number
        if number > at:
            raise self._refuse_size(at, "a memo entry far beyond the last one")
        self._most_entries = max(self._most_entries, number + 1)
        return 0

    def _check_pairs(self, at: Array, before: Array) -> None:
        """Refuse tuples of other than two numbers, which the two opcodes before must have made."""
        bad = ~self._is_number[before].all(axis=1)
        self._unsure_pairs += int((before == _UNKNOWN).any(axis=1).sum())
        if bad.any() or self._unsure_pairs > _MOST_UNSURE_PAIRS:
            place = int(at[int(np.argmax(bad))])
            raise self._refuse_size(place, "a tuple of something other than two numbers")

    def _read_number(self, at: int, width: int) -> int:
        return int.from_bytes(self._data[at : at + width].tobytes(), "little")

    def _refuse(self, at: int, code: int) -> SnapshotError:
        name = _NAMES.get(code)
        what = f"the opcode {name}" if name else f"0x{code:02x}, which is no opcode"
        return SnapshotError(
            f"{self._name} is refused: at byte {at} it holds {what}; a snapshot is made of dicts, "
            "lists, text and numbers only, so the file is damaged or made to do harm"
        )

    def _refuse_size(self, at: int, what: str) -> SnapshotError:
        return SnapshotError(
            f"{self._name} is refused: at byte {at} it holds {what}, which no snapshot has; the "
            "file is damaged or made to do harm"
        )

    def _cut_off(self) -> SnapshotError:
        return SnapshotError(
            f"cannot read {self._name}: the pickle is cut off or damaged; copy or dump it again"
        )

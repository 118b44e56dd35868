"""Which numbers can stand in which column: tables can be whole, and what is in them damaged.

Rows point at rows of other tables by number. One that leads nowhere would end in a traceback, or,
worse, in numbers that look right; one that is far too high would make arrays as long.
"""

import pyarrow as pa
import pyarrow.compute as pc

from attnprof.errors import RunFormatError
from attnprof.store.reader import StoredRun
from attnprof.store.schema import BACKWARD_END, FREED, RESIZED, TABLES
from attnprof.vocabulary import Status

_MOST_BYTES = 2**60
"""Of one storage; a dry run may be of far more than any machine has."""
_MOST_UNSEEN = 10_000
"""How many numbers may have been given to what has no row: to module calls that a killed program
was in, to storages that two threads met at once, to ops that came too late for the last commit."""

_BYTES, _COUNT, _ANY = (0, "bytes"), (0, "numbers"), (-1, "numbers")
_OP = (0, "ops, about")

_RANGES: dict[str, dict[str, tuple[int, str]]] = {
    "ops": {
        "time_ns": _COUNT,
        "code": (0, "codes"),
        "scope": (-1, "module calls"),
        "thread": _COUNT,
        "seq": _ANY,
        "n_in": _COUNT,
        "n_out": _COUNT,
    },
    "operands": {"storage": (0, "storages"), "signature": (0, "signatures")},
    "storage_events": {
        "storage": (0, "entered storages"),
        "kind": (0, "event kinds"),
        "size_bytes": _BYTES,
        "device": (-1, "devices"),
        "time_ns": _COUNT,
        "op": _OP,
        "signature": (-1, "signatures"),
    },
    "signatures": {"shape": _BYTES, "stride": _BYTES},
    "modules": {"module": (0, "entered modules"), "root": (0, "modules")},
    "scopes": {
        "scope": (0, "module calls"),
        "parent": (-1, "module calls"),
        "module": (-1, "modules"),
        "flags": _COUNT,
        "enter_op": (0, "ops"),
        "exit_op": (0, "ops"),
        "enter_ns": _COUNT,
        "exit_ns": _COUNT,
    },
    "identities": {
        "storage": (0, "storages"),
        "module": (-1, "modules"),
        "owner": (-1, "storages"),
        "op": _OP,
    },
    "marks": {"kind": (0, "mark kinds"), "time_ns": _COUNT, "op": _OP},
    "samples": {"process_bytes": _BYTES, "used_bytes": _BYTES, "total_bytes": _BYTES},
    "allocator_events": {"device": (0, "devices"), "size_bytes": _BYTES, "op": (-1, "ops, about")},
    "private_segments": {
        "event": _COUNT,
        "device": (0, "devices"),
        "size_bytes": _BYTES,
        "pool": (1, "numbers"),
    },
    "allocator_contexts": {"stack": (-1, "stacks")},
    "stacks": {"frames": (0, "frames")},
    "annotations": {"device": (0, "devices")},
    "block_tables": {
        "op": _OP,
        "storage": (0, "storages"),
        "layers": _COUNT,
        "block_tokens": (1, "numbers"),
        **dict.fromkeys(
            ("free", "allocated", "used", "shared", "tokens", "sequences", "blocks", "filled"),
            _COUNT,
        ),
        "owners": _COUNT,
    },
    "counted_steps": {
        "op": _OP,
        "step": _COUNT,
        "device": (0, "devices"),
        "allocated_bytes": _BYTES,
        "peak_bytes": (-1, "bytes"),
        "reserved_bytes": _BYTES,
    },
}
"""Per column the least number, and what its numbers are of: see `_count_all`."""


def check_ranges(stored: StoredRun) -> None:
    """Refuse a run in whose tables a number leads nowhere.

    Raises:
        RunFormatError: There is one, or tables do not belong together.
    """
    tables = {name: stored.table(name) for name in TABLES}
    limits = _count_all(tables, is_complete=stored.status is Status.COMPLETED)
    faults = (
        _find_fault(tables[name][column], f"{column} of {name}", least, kind, limits[kind])
        for name, ranges in _RANGES.items()
        for column, (least, kind) in ranges.items()
    )
    fault = next(filter(None, faults), None) or _find_mismatch(tables)
    if fault is not None:
        raise RunFormatError(
            f"cannot read {stored.path}: its tables are damaged: {fault}; copy the whole directory "
            "again or record the run anew"
        )


def _count_all(tables: dict[str, pa.Table], *, is_complete: bool) -> dict[str, int]:
    """Return how many there are of what numbers stand for."""
    rows = {name: len(table) for name, table in tables.items()}
    # While ops are taken from the recorder, threads count some twice, and go on to later ones.
    about = 2 * rows["ops"] + _MOST_UNSEEN
    return {
        **rows,
        "numbers": 2**63 - 1,
        "bytes": _MOST_BYTES,
        "ops": rows["ops"] + 1 if is_complete else about,  # numbers of ops that had finished
        "ops, about": about,
        "event kinds": RESIZED + 1,
        "mark kinds": BACKWARD_END + 1,
        # Arrays are as long as the highest of these numbers.
        "entered storages": 2 * rows["storage_events"] + _MOST_UNSEEN,
        "storages": _find_highest(tables["storage_events"]["storage"]) + 1,
        "module calls": rows["scopes"] + rows["ops"] + _MOST_UNSEEN,
        "entered modules": rows["modules"] + _MOST_UNSEEN,
        "modules": _find_highest(tables["modules"]["module"]) + 1,
    }


def _find_highest(numbers: pa.ChunkedArray) -> int:
    highest = pc.max(numbers).as_py()
    return -1 if highest is None else int(highest)


def _find_fault(
    numbers: pa.ChunkedArray, column: str, least: int, kind: str, limit: int
) -> str | None:
    if pa.types.is_list(numbers.type):
        if numbers.null_count:
            return f"{column} has a row without numbers"
        numbers = pc.list_flatten(numbers)
    if numbers.null_count:
        return f"{column} has a row without a number"
    extremes = pc.min_max(numbers).as_py()
    lowest, highest = extremes["min"], extremes["max"]
    if lowest is None or (least <= lowest and highest < limit):
        return None
    found = lowest if lowest < least else highest
    return f"{column} has {found}, expected from {least} to {limit - 1} ({kind})"


def _find_mismatch(tables: dict[str, pa.Table]) -> str | None:
    """Return which tables do not belong together, in a few words."""
    ops, events, contexts = (
        tables[name] for name in ("ops", "storage_events", "allocator_contexts")
    )
    operands = (pc.sum(ops["n_in"]).as_py() or 0) + (pc.sum(ops["n_out"]).as_py() or 0)
    if operands != len(tables["operands"]):
        return f"ops count {operands} operands, and there are {len(tables['operands'])}"
    if len(contexts) not in (0, len(tables["allocator_events"])):
        return (
            f"allocator_contexts has {len(contexts)} rows, and allocator_events "
            f"{len(tables['allocator_events'])}"
        )
    is_nowhere = pc.and_(pc.less(events["device"], 0), pc.not_equal(events["kind"], FREED))
    rules = {
        "storage_events has a storage that is on no device": is_nowhere,
        "scopes has a module call that was made in a later one": pc.greater_equal(
            tables["scopes"]["parent"], tables["scopes"]["scope"]
        ),
        "modules has a root that is no module": pc.invert(
            pc.is_in(tables["modules"]["root"], tables["modules"]["module"])
        ),
    }
    return next((what for what, broken in rules.items() if pc.any(broken).as_py()), None)

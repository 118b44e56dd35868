"""What run.json says, and of which types: a damaged or foreign one is refused when it is opened."""

from typing import Any

Kind = type | tuple[type | None, ...] | dict[str, Any] | list[Any]
"""A type, several of them (None for null), the kinds of an object's keys, or a list's only kind."""

_COUNTERS = {
    f"{name}_bytes_{which}": int
    for name in ("allocated", "reserved")
    for which in ("current", "peak")
}

_KNOWN: dict[str, Any] = {
    "created?": str,
    "ended?": str,
    "recording_stopped?": str,
    "environment?": {
        "attnprof?": (str, None),
        "torch?": (str, None),
        "transformers?": (str, None),
        "python?": (str, None),
        "gpus?": [str],
        "compute_capabilities?": [[int]],
    },
    "error?": {"type?": str, "message?": str},
    "workload?": {"seq_len": int, "source": str, "make_step?": str, "steps?": int},
    "dry_run?": {
        "target": str,
        "device?": (str, None),
        "compute_capability?": [int],
        "assumptions?": [str],
        "tables?": [{"at": str, "rows": int, "used": int}],
    },
    "allocator?": {
        "backend?": str,
        "settings?": {},
        "lost_events?": bool,
        "notes_ops?": bool,
        "devices?": {"*": {"begin?": _COUNTERS, "end?": {**_COUNTERS, "*": int}}},
        "pinned?": {"*": int},
    },
    "snapshot?": {
        "file?": str,
        "events?": int,
        "has_segments?": bool,
        "has_stacks?": bool,
        "sizes_are_exact?": bool,
        "allocator_settings?": {},
    },
    "reserved_peak_bytes?": {"*": int},
}
"""The keys that are read. One with ``?`` may be missing, ``*`` stands for all that have no kind."""

_WORDS: dict[type | None, str] = {
    str: "text",
    int: "a whole number from 0 on",
    bool: "true or false",
    None: "null",
}


def find_fault(info: dict[str, Any]) -> str | None:
    """Return what is wrong with the content of a run.json, in a few words; None if nothing is.

    Keys that nobody reads may be anything, so that other versions can have more of them.

    Args:
        info: The content.
    """
    return _find_fault(info, _KNOWN, "")


def _find_fault(value: Any, kind: Kind, at: str) -> str | None:
    if isinstance(kind, dict):
        return _find_in_object(value, kind, at)
    if isinstance(kind, list):
        if not isinstance(value, list):
            return _tell(value, at, "a list")
        faults = (_find_fault(item, kind[0], f"{at}[{i}]") for i, item in enumerate(value))
        return next((fault for fault in faults if fault), None)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if any(_is_of(value, each) for each in kinds):
        return None
    return _tell(value, at, " or ".join(_WORDS[each] for each in kinds))


def _find_in_object(value: Any, kinds: dict[str, Any], at: str) -> str | None:
    if not isinstance(value, dict):
        return _tell(value, at, "an object")
    named = {key.removesuffix("?"): kind for key, kind in kinds.items()}
    for key in kinds:
        if key[-1] not in "?*" and key not in value:
            return f"{at} has no {key!r}"
    for key, item in value.items():
        kind = named.get(key, named.get("*"))
        fault = None if kind is None else _find_fault(item, kind, f"{at}.{key}" if at else key)
        if fault:
            return fault
    return None


def _is_of(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    return isinstance(value, kind)


def _tell(value: Any, at: str, expected: str) -> str:
    found = repr(value)
    return f"{at} is {found if len(found) <= 40 else found[:39] + '…'}, expected {expected}"

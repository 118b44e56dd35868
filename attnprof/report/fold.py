"""Fold the names of repeated layers into one: ``h.0.attn``, ``h.1.attn`` -> ``h.[0-1].attn``."""

from collections.abc import Iterable, Sequence

Part = str | tuple[int, ...]
"""One component of a module path: text, or the numbers that were folded into it."""


def fold_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Fold names that differ only in their numbers.

    Args:
        names: Module paths; only components that are numbers are folded.

    Returns:
        Per folded name, in the order of its first member, the names it stands for.
    """
    folded: list[tuple[tuple[Part, ...], list[str]]] = [
        (tuple(_split(name)), [name]) for name in dict.fromkeys(names)
    ]
    depth = max((len(parts) for parts, _ in folded), default=0)
    for position in reversed(range(depth)):
        folded = _fold_at(position, folded)
    return {".".join(_show(part) for part in parts): members for parts, members in folded}


def _split(name: str) -> list[Part]:
    return [(int(part),) if part.isdecimal() else part for part in name.split(".")]


def _fold_at(
    position: int, items: Sequence[tuple[tuple[Part, ...], list[str]]]
) -> list[tuple[tuple[Part, ...], list[str]]]:
    """Merge items that are equal but for a number at ``position``."""
    groups: dict[object, list[tuple[tuple[Part, ...], list[str]]]] = {}
    for parts, members in items:
        is_number = position < len(parts) and isinstance(parts[position], tuple)
        key = (parts[:position], parts[position + 1 :], len(parts)) if is_number else parts
        groups.setdefault((is_number, key), []).append((parts, members))
    merged = []
    for group in groups.values():
        parts = group[0][0]
        if len(group) > 1:
            numbers = sorted({n for other, _ in group for n in _numbers(other[position])})
            parts = (*parts[:position], tuple(numbers), *parts[position + 1 :])
        merged.append((parts, [name for _, members in group for name in members]))
    return merged


def _numbers(part: Part) -> tuple[int, ...]:
    return part if isinstance(part, tuple) else ()


def _show(part: Part) -> str:
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return str(part[0])
    spans: list[list[int]] = []
    for number in part:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "[" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "]"

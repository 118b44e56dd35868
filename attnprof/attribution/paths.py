"""Names of modules, as seen from the outermost module that contains them."""

import pyarrow as pa

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attribute names under which torch's own wrappers keep the module they wrap."""


def resolve_module_paths(modules: pa.Table) -> list[str]:
    """Return a path per module number, with an empty last entry for "no module".

    Every module is named from the largest root that contains it. One model keeps its plain
    paths. Where several unrelated models ran, each path begins with the class name of its root
    (numbered when two roots share it), since ``h.0.attn`` alone would not say whose.
    """
    numbers = modules["module"].to_pylist()
    roots = modules["root"].to_pylist()
    paths = modules["path"].to_pylist()
    classes = modules["class_name"].to_pylist()
    families: dict[int, set[int]] = {}
    class_of: dict[int, str] = {}
    for number, root, name in zip(numbers, roots, classes, strict=True):
        families.setdefault(root, set()).add(number)
        class_of[number] = name
    outer = _outermost(families)
    models = [root for root in outer if len(families[root]) > 1]
    labels = _label(outer, class_of, plain=models[0] if len(models) == 1 else None)
    result = [""] * (max(numbers, default=-1) + 2)
    for number, root, path in zip(numbers, roots, paths, strict=True):
        if root in labels and not result[number]:
            own = ".".join(part for part in path.split(".") if part and part not in _WRAPPERS)
            result[number] = ".".join(filter(None, (labels[root], own)))
    return result


def _outermost(families: dict[int, set[int]]) -> list[int]:
    """Return the roots that no other root contains, in the order in which they were seen."""
    inside = {number for root, family in families.items() for number in family if number != root}
    return [root for root in families if root not in inside]


def _label(outer: list[int], class_of: dict[int, str], *, plain: int | None) -> dict[int, str]:
    """Return a prefix per root: none for the only model, the class name for the others."""
    labels: dict[int, str] = {}
    seen: dict[str, int] = {}
    for root in outer:
        name = class_of[root]
        seen[name] = seen.get(name, 0) + 1
        labels[root] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    if plain is not None:
        labels[plain] = ""
    return labels


def common_path(paths: list[str]) -> str:
    """Return the innermost module path that contains all of ``paths``."""
    split = [path.split(".") if path else [] for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if any(part != parts[0] for part in parts):
            break
        shared.append(parts[0])
    return ".".join(shared)

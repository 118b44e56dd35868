"""Names of modules, as seen from the outermost module that contains them."""

import pyarrow as pa

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attribute names under which torch's own wrappers keep the module they wrap."""


def resolve_module_paths(modules: pa.Table, called: set[int]) -> list[str | None]:
    """Return a path per module number; None for modules that belong to no model.

    Every module is named from the largest root that contains it. One model keeps its plain
    paths. Where several unrelated models ran, each path begins with the class name of its root
    (numbered when two roots share it), since ``h.0.attn`` alone would not say whose.

    Args:
        modules: The run's table of modules.
        called: Modules that the program called itself rather than from inside another one. A root
            that is not among them (``nn.Softmax()(x)`` within a forward) has no name of its own.
    """
    numbers = modules["module"].to_pylist()
    roots = modules["root"].to_pylist()
    paths = modules["path"].to_pylist()
    families: dict[int, set[int]] = {}
    class_of: dict[int, str] = {}
    for number, root, name in zip(numbers, roots, modules["class_name"].to_pylist(), strict=True):
        families.setdefault(root, set()).add(number)
        class_of[number] = name
    outer = [root for root in _outermost(families) if root in called]
    models = [root for root in outer if len(families[root]) > 1]
    labels = _label(outer, class_of, plain=models[0] if len(models) == 1 else None)
    result: list[str | None] = [None] * (max(numbers, default=-1) + 1)
    for number, root, path in zip(numbers, roots, paths, strict=True):
        if root in labels and result[number] is None:
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


def is_inside(path: str, module: str) -> bool:
    """Return whether a path is that of a module or of one inside of it."""
    return not module or path == module or path.startswith(f"{module}.")

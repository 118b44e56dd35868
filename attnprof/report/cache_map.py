"""Caches as pictures: what each layer holds after every forward, and how pages are filled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from attnprof.report.drawing import HEIGHT, WIDTH, Longs, outline
from attnprof.report.fold import fold_names

Rows = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""A row per column of a frame, a column per forward."""

_MOST_STRIPS = 24
"""More than these, and consecutive layers that hold the same share one."""


@dataclass(frozen=True, slots=True)
class Area:
    """One outline of a picture; what is drawn later lies over it."""

    kind: str
    """What it shows: a key of the legend, and a class of the style sheet."""
    path: str


@dataclass(frozen=True, slots=True)
class Strip:
    """What one layer, or several that are alike, held after every forward."""

    label: str
    """The number in the layer's path; folded where it stands for several."""
    held_bytes: int
    """The most that each of them held."""
    areas: tuple[Area, ...]


@dataclass(frozen=True, slots=True)
class StripGroup:
    """Layers of one kind, drawn to one scale."""

    name: str
    """The folded path."""
    kind: str
    category: str
    top_bytes: int
    """What the height of a strip stands for."""
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class BlockChart:
    """How the pages of one pool were filled after every forward."""

    name: str
    """The folded paths of the layers whose table it is."""
    block_tokens: int
    blocks: int
    """What the height stands for: all of the pool's."""
    areas: tuple[Area, ...]


def draw_strips(frame: pl.DataFrame) -> list[StripGroup]:
    """Draw `Run.kv_cache`, a strip per layer: forwards from left to right, bytes upwards.

    Layers with a block table are left to `draw_blocks`.
    """
    x = _find_columns(frame)
    paged = frame.drop_nulls("block_tokens")["layer"].unique()
    members: dict[tuple[str, str], dict[str, Rows]] = {}
    others = frame.filter(~pl.col("layer").is_in(paged.to_list()))
    for (layer, category, kind), rows in others.group_by(
        "layer", "category", "kind", maintain_order=True
    ):
        sizes = _spread(frame, rows, ["used_bytes", "held_bytes", "growing_bytes"])
        members.setdefault((str(category), str(kind)), {})[str(layer)] = sizes
    return [
        _draw_group(name, category, kind, {layer: layers[layer] for layer in names}, x)
        for (category, kind), layers in members.items()
        for name, names in fold_names(layers).items()
    ]


def _find_columns(frame: pl.DataFrame) -> Longs:
    """Return where the column of each forward begins."""
    count = frame["forward"].n_unique()
    result: Longs = np.arange(count, dtype=np.int64) * WIDTH // count
    return result


def _spread(frame: pl.DataFrame, rows: pl.DataFrame, columns: Sequence[str]) -> Rows:
    """Return columns of some rows, one by one, for every forward of the frame: 0 without a row."""
    at = np.searchsorted(frame["forward"].unique().sort().to_numpy(), rows["forward"].to_numpy())
    values: Rows = np.zeros((len(columns), frame["forward"].n_unique()), np.int64)
    values[:, at] = rows.select(columns).to_numpy().T
    return values


def _draw_group(
    name: str, category: str, kind: str, layers: dict[str, Rows], x: Longs
) -> StripGroup:
    # Rows: used, held, growing.
    top = max(int((sizes[1] + sizes[2]).max()) for sizes in layers.values())
    strips = []
    for names in _merge_alike(layers):
        used, held, growing = list(layers[names[0]])
        levels = {"older": held + growing, "empty": held, "used": used}
        strips.append(
            Strip(
                label=_label(name, names),
                held_bytes=int(held.max()),
                areas=tuple(_draw_levels(levels, top, x)),
            )
        )
    return StripGroup(name, kind, category, top, tuple(strips))


def _merge_alike(layers: dict[str, Rows]) -> list[list[str]]:
    """Return layers one by one; where they are many, those next to each other that are alike."""
    if len(layers) <= _MOST_STRIPS:
        return [[name] for name in layers]
    runs: list[list[str]] = []
    for name, sizes in layers.items():
        if runs and np.array_equal(layers[runs[-1][0]], sizes):
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _label(folded: str, names: Sequence[str]) -> str:
    """Return the numbers of layers where a folded name has a range; nothing for one layer."""
    parts = zip(folded.split("."), next(iter(fold_names(names))).split("."), strict=True)
    return ".".join(own.strip("[]") for whole, own in parts if whole.startswith("["))


def _draw_levels(levels: dict[str, Longs], top: int, x: Longs) -> Iterator[Area]:
    """Yield the outlines of levels, the highest first, but for those that the next one hides."""
    below = [*list(levels.values())[1:], np.zeros_like(x)]
    for (kind, level), hidden in zip(levels.items(), below, strict=True):
        if (level > hidden).any():
            y = np.rint((1 - level / max(1, top)) * HEIGHT).astype(np.int64)
            yield Area(kind, outline(x, y))


def draw_blocks(frame: pl.DataFrame) -> list[BlockChart]:
    """Draw the block tables of `Run.kv_cache`: one chart per table, whichever layers share it."""
    columns = ["tokens", "used_blocks", "shared_blocks", "allocated_blocks", "free_blocks"]
    layers_of: dict[tuple[int, bytes], list[str]] = {}
    tables: dict[tuple[int, bytes], Rows] = {}
    known = frame.drop_nulls("block_tokens")
    for (layer,), rows in known.group_by("layer", maintain_order=True):
        table = _spread(frame, rows, columns)
        key = int(rows["block_tokens"][0]), table.tobytes()
        layers_of.setdefault(key, []).append(str(layer))
        tables[key] = table
    x = _find_columns(frame)
    return [
        _draw_table(", ".join(fold_names(layers_of[key])), key[0], table, x)
        for key, table in tables.items()
    ]


def _draw_table(name: str, block_tokens: int, table: Rows, x: Longs) -> BlockChart:
    tokens, used, shared, allocated, free = list(table)
    blocks = int((allocated + free).max())
    # In hundredths of a block, since the last block of a sequence is filled in part.
    levels = {
        "kept": np.full_like(free, 100 * blocks),
        "free": 100 * (allocated + free),
        "reserved": 100 * allocated,
        "slack": 100 * used,
        "used": np.maximum(100 * shared, 100 * tokens // block_tokens),
        "shared": 100 * shared,
    }
    return BlockChart(name, block_tokens, blocks, tuple(_draw_levels(levels, 100 * blocks, x)))

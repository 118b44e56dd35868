"""How full the blocks of a paged cache are, from what its engine said."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import polars as pl

from attnprof.analysis.forwards import Forward, find_forwards
from attnprof.attribution.attribute import Attribution
from attnprof.attribution.facts import Facts

SCHEMA = {
    "block_tokens": pl.Int64,
    "allocated_blocks": pl.Int64,
    "used_blocks": pl.Int64,
    "shared_blocks": pl.Int64,
    "free_blocks": pl.Int64,
    "last_block_slack_bytes": pl.Int64,
}
"""Columns of `BlockTables.describe`."""

EMPTY: dict[str, int | None] = dict.fromkeys(SCHEMA)


class BlockTables:
    """The block tables that a run's engine noted."""

    def __init__(self, facts: Facts) -> None:
        """Read the run's table."""
        self._rows = facts.stored.table("block_tables").to_pylist()

    def find(self, path: str, storages: Iterable[int], forward: Forward) -> dict[str, int] | None:
        """Return the newest table of a layer when a forward had ended, if its engine noted one.

        Args:
            path: The layer's module path; its numbers say which of a pool's tables is meant.
            storages: The storages that hold the layer's cache.
            forward: The forward.
        """
        if not self._rows:
            return None
        own, numbers = set(storages), set(path.split("."))
        fitting = [
            row
            for row in self._rows
            if row["op"] < forward.exit_op
            and row["storage"] in own
            and (not row["layers"] or numbers & {str(layer) for layer in row["layers"]})
        ]
        return fitting[-1] if fitting else None


BLOCK_SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "forward": pl.Int64,
    "pool": pl.Int64,
    "layers": pl.List(pl.Int64),
    "block": pl.Int64,
    "tokens": pl.Int64,
    "sequences": pl.Int64,
    "block_tokens": pl.Int64,
    "free_blocks": pl.Int64,
    "pool_blocks": pl.Int64,
}
"""Columns of `list_blocks`."""


def list_blocks(attribution: Attribution) -> pl.DataFrame:
    """Return the blocks that sequences had: a row per forward, table and block.

    Columns: ``forward``; ``pool``, the number of the pool's storage; ``layers``, the numbers of
    those that share the table, none for all; ``block``, its number; ``tokens`` in it; ``sequences``
    that have it; ``block_tokens`` that it has room for; ``free_blocks`` after the forward;
    ``pool_blocks``, the most that were taken or free at a time: what is neither the engine keeps,
    for prompts that come again or for other layers.

    Args:
        attribution: A run's facts and what they mean.
    """
    rows = attribution.facts.stored.table("block_tables").to_pylist()

    def key(row: dict[str, Any]) -> tuple[int, list[int]]:
        return row["storage"], row["layers"]

    forwards = find_forwards(attribution) if rows else []
    tables = [list(own) for _, own in groupby(sorted(rows, key=key), key)]
    found = [
        {
            "forward": forward.number,
            "pool": table["storage"],
            "layers": table["layers"],
            "block": table["blocks"],
            "tokens": table["filled"],
            "sequences": table["owners"],
            "block_tokens": table["block_tokens"],
            "free_blocks": table["free"],
            "pool_blocks": max(row["allocated"] + row["free"] for row in own),
        }
        for own in tables
        for forward in forwards
        if (table := _newest(own, forward)) is not None
    ]
    lists = ("block", "tokens", "sequences")
    frame = pl.DataFrame(found, schema=BLOCK_SCHEMA | dict.fromkeys(lists, pl.List(pl.Int64)))
    return frame.explode(*lists).drop_nulls("block").sort("pool", "layers", "forward", "block")


def _newest(rows: Sequence[dict[str, Any]], forward: Forward) -> dict[str, Any] | None:
    """Return what was noted last when a forward had ended."""
    return next((row for row in reversed(rows) if row["op"] < forward.exit_op), None)


def describe_blocks(table: dict[str, int], token_bytes: int) -> dict[str, int | None]:
    """Return the columns of a layer's row: of blocks, and of the room in the last of each.

    Args:
        table: One row of the run's block tables.
        token_bytes: What one token takes in this layer.
    """
    room = table["used"] * table["block_tokens"] - table["tokens"]
    return {
        "block_tokens": table["block_tokens"],
        "allocated_blocks": table["allocated"],
        "used_blocks": table["used"],
        "shared_blocks": table["shared"],
        "free_blocks": table["free"],
        "last_block_slack_bytes": room * token_bytes,
    }

"""How full the blocks of a paged cache are, from what its engine said."""

from collections.abc import Iterable

import polars as pl

from attnprof.analysis.forwards import Forward
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

"""What only an engine knows of its paged cache: which block belongs to which sequence.

A block table is a matter of numbers, and numbers are not recorded: from the ops alone one sees
how many tokens were read and written, and not which blocks are free. So the engine says it.
"""

from collections import Counter
from collections.abc import Sequence
from operator import index

import torch

from attnprof.capture import tracer as tracing

_TOO_LARGE = 2**31
"""Of blocks and tokens; files have room for the sums of as many."""


def note_blocks(
    pool: torch.Tensor,
    *,
    block_tokens: int,
    free_blocks: int,
    sequences: Sequence[tuple[Sequence[int], int]],
    layers: Sequence[int] = (),
) -> None:
    """Record how a paged cache is filled; call it once per forward, before or inside of it.

    Does nothing when no trace is running, so it can stay in the code of an engine; nor in steps
    that are only counted.

    Args:
        pool: The tensor that the blocks are in.
        block_tokens: Tokens that one block has room for.
        free_blocks: Blocks that belong to no sequence.
        sequences: Per sequence its blocks, in order, and how many tokens are in them once the
            forward has ended.
        layers: Numbers of the layers that this table is for, where a pool has several; a layer's
            number is the number in its module path. Without: all layers that use the pool.

    Raises:
        ValueError: A number is negative, or a sequence has more tokens than its blocks hold.
        TypeError: ``pool`` is not a tensor, or what should be a whole number is none.
    """
    if not isinstance(pool, torch.Tensor):
        raise TypeError(f"note_blocks() takes a tensor as its pool, got {type(pool).__name__}")
    try:
        block_tokens, free_blocks = index(block_tokens), index(free_blocks)
        sequences = [([index(b) for b in blocks], index(n)) for blocks, n in sequences]
        layers = [index(layer) for layer in layers]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"note_blocks() got what is no whole number: {error}; expected numbers of blocks, "
            "tokens and layers, and a pair of blocks and tokens per sequence"
        ) from None
    if not (1 <= block_tokens < _TOO_LARGE and 0 <= free_blocks < _TOO_LARGE):
        raise ValueError(
            f"note_blocks() got block_tokens={block_tokens} and free_blocks={free_blocks}; "
            f"expected at least 1 and 0, and less than {_TOO_LARGE}"
        )
    tokens_in: dict[int, int] = {}
    for blocks, tokens in sequences:
        if not 0 <= tokens <= len(blocks) * block_tokens:
            raise ValueError(
                f"note_blocks() got a sequence of {tokens} tokens in {len(blocks)} blocks of "
                f"{block_tokens}; expected from 0 to {len(blocks) * block_tokens}"
            )
        for place, block in enumerate(blocks):
            inside = min(max(tokens - place * block_tokens, 0), block_tokens)
            tokens_in[block] = max(tokens_in.get(block, 0), inside)
    owners = Counter(block for blocks, _tokens in sequences for block in set(blocks))
    active = tracing._active
    if active is None or not active.is_recording or active._recorder is None:
        return
    storage = active.ledger.find(pool)
    if storage < 0:
        return
    active._recorder.block_tables.append(
        (
            active._recorder.count_ops(),
            storage,
            layers,
            block_tokens,
            free_blocks,
            len(tokens_in),
            sum(1 for tokens in tokens_in.values() if tokens),
            sum(1 for count in owners.values() if count > 1),
            sum(tokens_in.values()),
            len(sequences),
            list(tokens_in),
            list(tokens_in.values()),
            [owners[block] for block in tokens_in],
        )
    )

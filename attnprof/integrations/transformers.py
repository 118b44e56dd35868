"""The block tables of transformers' continuous batching.

Everything else about transformers is read from data flow and needs no adapter.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from attnprof.capture.block_tables import note_blocks


@contextmanager
def paged_cache() -> Iterator[None]:
    """Record the block tables of every `PagedAttentionCache` used inside ``with``.

    Put it around ``model.generate_batch(...)``, inside or around ``attnprof.trace()``. Nothing is
    recorded where no trace is running. The generating thread may be another one.

    Raises:
        ImportError: transformers is not installed, or its release has no paged cache of this form
            (written for 5.23).
    """
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    lengths: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
    extend = PagedAttentionCache.extend_read_and_write_indices
    update, free = PagedAttentionCache.update, PagedAttentionCache.free_blocks

    def note_length(
        self: Any, request_id: str, past_length: int, query_length: int, *args: Any, **kwargs: Any
    ) -> Any:
        lengths.setdefault(self, {})[request_id] = past_length + query_length
        return extend(self, request_id, past_length, query_length, *args, **kwargs)

    def note_tables(
        self: Any, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        for allocator in self.cache_allocators.values():
            if layer_idx == allocator.layer_indices[0]:
                _note(self, allocator, lengths.get(self, {}))
        return update(self, key_states, value_states, layer_idx, *args, **kwargs)

    def forget_length(self: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        lengths.get(self, {}).pop(request_id, None)
        return free(self, request_id, *args, **kwargs)

    with ExitStack() as stack:
        for name, function in (
            ("extend_read_and_write_indices", note_length),
            ("update", note_tables),
            ("free_blocks", forget_length),
        ):
            stack.enter_context(patch.object(PagedAttentionCache, name, function))
        yield


def _note(cache: Any, allocator: Any, lengths: dict[str, int]) -> None:
    """Record one table; blocks in sectors that no allocator has asked for are free too."""
    free = cache.pool.count_free_blocks(allocator.index)
    free += cache.pool.num_free_sectors * allocator.blocks_per_sector
    room = allocator.tokens_per_page
    note_blocks(
        cache.cache_tensor,
        block_tokens=room,
        free_blocks=free,
        sequences=[
            (blocks, min(lengths.get(request, 0), len(blocks) * room))
            for request, blocks in allocator.block_table.items()
        ],
        layers=allocator.layer_indices,
    )

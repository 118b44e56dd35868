"""Traced runs: with CUDA, blocks come from the allocator's own history."""

from dataclasses import fields, replace

from attnprof.analysis.device_history import AllocatorAttribution, DeviceHistory, read_histories
from attnprof.attribution.attribute import Attribution, attribute
from attnprof.attribution.order import DeviceBlocks
from attnprof.store.reader import StoredRun


def attribute_traced(stored: StoredRun) -> Attribution:
    """Attribute every block of a traced run, or of a dry one.

    Args:
        stored: The run.
    """
    histories = read_histories(stored, stored.info.get("allocator", {}).get("settings", {}))
    attribution = attribute(stored, [_list_blocks(history) for history in histories])
    if not histories:
        return attribution
    placed = [
        replace(
            history,
            position=each.position,
            time_ns=attribution.facts.events["time_ns"][each.position],
        )
        for history, each in zip(histories, attribution.facts.allocated, strict=True)
    ]
    parts = {field.name: getattr(attribution, field.name) for field in fields(attribution)}
    return AllocatorAttribution(**parts, histories=placed)


def _list_blocks(history: DeviceHistory) -> DeviceBlocks:
    lives = history.lives
    return DeviceBlocks(
        device=history.number,
        op=history.op,
        is_seed=history.events.is_seed,
        begin=lives.begin,
        end=lives.end,
        address=history.events.address[lives.begin],
        requested_bytes=lives.requested_bytes,
        size_bytes=lives.size_bytes,
    )

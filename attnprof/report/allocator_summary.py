"""What reports say about an allocator: what it had reserved, and the request that failed."""

from dataclasses import asdict, dataclass
from typing import Any

from attnprof.analysis.memory_state import FailedRequest, MemoryState
from attnprof.analysis.peak import Peak
from attnprof.run import Run
from attnprof.units import format_bytes


@dataclass(frozen=True, slots=True)
class Holding:
    """What one place of the program held of one category when a request failed."""

    layer: str
    category: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AllocatorSummary:
    """One run's allocator, as reports tell it."""

    state: MemoryState | None
    """At the peak; None where the history says nothing of it."""
    failure: FailedRequest | None
    """The last request that failed; None if none did."""
    holdings: list[Holding]
    """Who held the memory then, largest first."""


def summarise_allocator(run: Run, peak: Peak) -> AllocatorSummary | None:
    """Return what is known of a run's allocator; None where its history is not part of the run.

    Args:
        run: The run.
        peak: The peak that the report is about.
    """
    state, failure = run.memory_state(peak), run.out_of_memory()
    if state is None and failure is None:
        return None
    rows = failure.held.by_layer().iter_rows() if failure is not None else ()
    return AllocatorSummary(state, failure, [Holding(*row) for row in rows])


def describe_state(state: MemoryState) -> str:
    """Return in a sentence what was reserved and in how many pieces it was free."""
    text = (
        f"{format_bytes(state.reserved_bytes)} were reserved for "
        f"{format_bytes(state.allocated_bytes)} in use; {format_bytes(state.free_bytes)} were "
        f"free in {state.free_blocks} pieces, the largest of them "
        f"{format_bytes(state.largest_free_block_bytes)}"
    )
    if state.private_free_bytes:
        text += (
            f"; {format_bytes(state.private_free_bytes)} of them lay in private pools (CUDA "
            "graphs, torch.cuda.MemPool) and served nobody else"
        )
    if state.private_bytes:
        text += f"; {format_bytes(state.private_bytes)} of what was in use lay in private pools"
    if state.awaiting_bytes:
        text += (
            f"; {format_bytes(state.awaiting_bytes)} more had been let go of, and other streams "
            "still used them"
        )
    return text + "."


def explain_failure(failure: FailedRequest) -> list[str]:
    """Return what was asked for, what there was, and what would have helped, a sentence each."""
    where = f" at {failure.place}" if failure.place else ""
    lines = [
        f"{format_bytes(failure.requested_bytes)} were asked for{where}. The device had "
        f"{format_bytes(failure.device_free_bytes)} free beside the allocator.",
        describe_state(failure.state),
    ]
    if failure.is_capped:
        lines.append(
            "The process was kept from taking more of the device; "
            "torch.cuda.set_per_process_memory_fraction sets such a limit."
        )
    if not failure.is_fragmented:
        elsewhere = " outside of private pools" if failure.state.private_free_bytes else ""
        lines.append(
            f"Even in one piece, what was free{elsewhere} would have been "
            f"{format_bytes(failure.missing_bytes)} too little: something has to be smaller, "
            "shorter-lived or elsewhere."
        )
    elif failure.fits_with_expandable_segments:
        lines.append(
            "What was free would have been enough in one piece. A replay of the same requests with "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, in the same memory, does not fail."
        )
    else:
        lines.append(
            "What was free would have been enough in one piece, but it was in too many."
            + (
                " A replay of the same requests with expandable_segments:True fails too."
                if failure.fits_with_expandable_segments is False
                else ""
            )
        )
    return lines


def describe_allocator(summary: AllocatorSummary | None) -> dict[str, Any]:
    """Return ``memory_state`` (at the peak) and ``out_of_memory`` for JSON, null if not known."""
    if summary is None:
        return {"memory_state": None, "out_of_memory": None}
    failure = summary.failure
    described = None
    if failure is not None:
        described = {
            "device": failure.device,
            "time_ns": failure.time_ns,
            "requested_bytes": failure.requested_bytes,
            "device_free_bytes": failure.device_free_bytes,
            "place": failure.place,
            **_list_state(failure.state),
            "is_capped": failure.is_capped,
            "is_fragmented": failure.is_fragmented,
            "fits_with_expandable_segments": failure.fits_with_expandable_segments,
            "by_category": failure.held.by_category(),
            "holders": [asdict(holding) for holding in summary.holdings],
        }
    state = None if summary.state is None else _list_state(summary.state)
    return {"memory_state": state, "out_of_memory": described}


def _list_state(state: MemoryState) -> dict[str, int]:
    return {**asdict(state), "free_bytes": state.free_bytes}

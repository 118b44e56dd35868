"""How far a report can be trusted: what is unexplained, what is inferred, how the run ended."""

from dataclasses import dataclass
from typing import Any

import polars as pl

from attnprof.analysis.peak import Peak, find_peak
from attnprof.analysis.reconcile import count_streams
from attnprof.analysis.steps import describe_steps
from attnprof.report.verdict import format_share
from attnprof.run import Run
from attnprof.units import format_bytes
from attnprof.vocabulary import AttentionKind, Category, Status


@dataclass(frozen=True, slots=True)
class Note:
    """One remark on a report's quality."""

    subject: str
    """One or two words."""
    text: str
    is_warning: bool = False
    """The reader should know this before believing the numbers."""


def head_status(run: Run) -> tuple[str, bool]:
    """Return in a word or two how a run ended, and whether that is all there is to know."""
    if run.has_lost_commits:
        return f"{run.status}, files incomplete", False
    return str(run.status), run.status is Status.COMPLETED


def collect_notes(run: Run, peak: Peak) -> list[Note]:
    """Return the remarks on a report; with a peak, always what is unattributed and inferred."""
    notes = [_note_status(run)]
    if peak.total_bytes:
        notes += [_note_unattributed(peak), _note_inferred(peak)]
    if run.has_lost_commits:
        notes.append(
            Note(
                "files",
                "the newest part of the run is missing from its files; the report covers what "
                "came before it",
                is_warning=True,
            )
        )
    if stopped_by := run.info.get("recording_stopped"):
        text = f"stopped early ({stopped_by}); the report covers what came before"
        notes.append(Note("recording", text, is_warning=True))
    if run.is_imported:
        notes.append(_note_imported(run))
    notes += [*_note_allocator(run, peak), *_note_counted(run, peak)]
    if peak.device == "cpu" and peak.total_bytes:
        notes.append(
            Note(
                "cpu",
                "storages are counted as the program makes and drops them; what an op takes and "
                "gives back inside itself is not seen on the CPU",
            )
        )
    return notes + _note_unseen(run, peak) + _note_other_devices(run, peak)


def _note_imported(run: Run) -> Note:
    about = run.info["snapshot"]
    text = (
        f"made of the snapshot {about.get('file')}: the allocator's events, without ops and "
        "modules; where a layer would be named stands the line of code that asked"
    )
    if not about.get("has_stacks"):
        text += "; it has no call stacks, so that hardly anything is explained"
    return Note("imported", text)


def _note_allocator(run: Run, peak: Peak) -> list[Note]:
    """Say whether the blocks add up to what torch itself counted, and what its history lacks."""
    about = run.info.get("allocator")
    if not about or not peak.device.startswith("cuda"):
        return []
    backend = about.get("backend")
    if backend != "native":
        text = (
            f"CUDA's memory came from the allocator {backend}, which keeps no history; sizes are "
            "those of tensors, and what ops take inside themselves is not seen"
        )
        return [Note("allocator", text, is_warning=True)]
    notes = [_note_counters(run, peak), *_note_context(about, peak), *_note_pinned(about)]
    if about.get("lost_events"):
        text = (
            "events of the allocator's history were dropped before they could be read; blocks and "
            "the peak may be wrong"
        )
        notes.append(Note("history", text, is_warning=True))
    if not about.get("notes_ops", True):
        text = (
            "this torch's allocator cannot note which op takes a block; what lies in which block "
            "is concluded from addresses and sizes, and more stays unattributed. torch 2.10 can"
        )
        notes.append(Note("ops", text, is_warning=True))
    if about.get("settings", {}).get("expandable_segments") is True:
        notes.append(Note("segments", "expandable_segments was on"))
    streams = count_streams(run.attribution, peak.device)
    if streams > 1:
        text = f"{streams} streams had blocks on {peak.device}; each has its own free memory"
        notes.append(Note("streams", text))
    return notes


def _note_counters(run: Run, peak: Peak) -> Note:
    own = [each for each in run.reconciliation() if each.device == peak.device]
    if not own:
        unread = run.info["allocator"].get("unread")
        why = f"could not be read at the end ({unread})" if unread else "were not recorded"
        return Note("allocator", f"torch's own counters {why}; nothing to compare with")
    off = [each for each in own if each.difference_bytes]
    if not off:
        counted = ", ".join(f"{each.counter} {format_bytes(each.counted_bytes)}" for each in own)
        return Note("allocator", f"0 bytes off torch's own counters: {counted}")
    said = ", ".join(
        f"{each.counter} is {each.counted_bytes} bytes, {each.difference_bytes:+} bytes off"
        for each in off
    )
    return Note("allocator", f"the blocks do not add up to torch's counters: {said}", True)


def _note_pinned(about: dict[str, Any]) -> list[Note]:
    """Say how much of the host's memory was pinned for copies to the device."""
    counted = about.get("pinned")
    if not counted:
        return []
    text = (
        f"at most {format_bytes(counted['allocated_bytes_peak'])} of the host's memory were "
        f"pinned, and {format_bytes(counted['active_bytes_peak'])} of them in use; no device's "
        "peak has them"
    )
    return [Note("pinned", text)]


def _note_counted(run: Run, peak: Peak) -> list[Note]:
    """Say which steps of a long loop have no blocks, and whether one of them needed more."""
    if not (run.attribution.timeline.counted >= 0).any():
        return []
    steps = describe_steps(run.attribution, device=peak.device)
    counted = steps.filter(~pl.col("is_detailed"))
    text = f"{len(counted)} of {len(steps)} steps were only counted"
    highest = counted.filter(pl.col("peak_bytes") > peak.total_bytes)
    if highest.is_empty():
        return [Note("steps", f"{text}; none of them is known to have needed more than this peak")]
    most = highest.sort("peak_bytes", descending=True).row(0, named=True)
    text += (
        f"; step {most['step']} reached {format_bytes(most['peak_bytes'])}, more than the peak "
        'shown here. attnprof.trace(detail="full") records every step'
    )
    return [Note("steps", text, is_warning=True)]


def _note_context(about: dict[str, Any], peak: Peak) -> list[Note]:
    """Say what of the device the process held in private pools, and beyond the allocator."""
    counted = about.get("devices", {}).get(peak.device, {}).get("end", {})
    notes = []
    if counted.get("private_bytes"):
        text = (
            f"{format_bytes(counted['private_bytes'])} of what was reserved at the end belong to "
            "private pools (CUDA graphs, torch.cuda.MemPool), whose free memory serves nobody "
            "else. A CUDA graph that is replayed takes no blocks and runs no ops: what it needs "
            "in there is shown by a trace in which the graph is recorded"
        )
        notes.append(Note("pools", text, is_warning=True))
    if not counted.get("process_bytes"):
        return notes  # no NVML, or it does not know this process
    process, reserved = counted["process_bytes"], counted["reserved_bytes_current"]
    text = (
        f"at the end the process held {format_bytes(process)} of {peak.device}, "
        f"{format_bytes(process - reserved)} more than the allocator had reserved: CUDA's context, "
        "libraries, and what they took by themselves"
    )
    return [*notes, Note("context", text)]


def _note_unseen(run: Run, peak: Peak) -> list[Note]:
    """Say what this kind of run cannot show: inside compiled code, inside ops that hold a layer."""
    notes = []
    if run.has_compiled_code:
        text = (
            "parts of the model were compiled and stayed so; which modules their kernels work for, "
            "and whether one of them is a softmax, is concluded from the kernels around them"
        )
        if peak.device == "cpu":
            text += ", and on the CPU what stays inside them is not counted"
        notes.append(Note("compiled", text, is_warning=True))
    if run.has_uncompiled_code:
        text = (
            "torch before 2.10 runs compiled parts of a model op by op while they are traced; the "
            "memory is that of the model without torch.compile"
        )
        notes.append(Note("uncompiled", text, is_warning=True))
    opaque = run.layers().filter(pl.col("kind") == AttentionKind.OPAQUE.value).height
    if opaque:
        text = f"{opaque} attention layer(s) ran as one op; their scores live inside it, unseen"
        notes.append(Note("opaque", text, is_warning=True))
    return notes


def _note_status(run: Run) -> Note:
    status = run.status
    if status is Status.COMPLETED:
        return Note("status", "completed")
    if status is Status.RECORDING:
        return Note("status", "still recording; the numbers cover what was written so far", True)
    text = f"{status.value}; the numbers cover what ran until then"
    error = run.info.get("error")
    if isinstance(error, dict):
        message = str(error.get("message", "")).strip().splitlines()
        text += f" ({error.get('type', 'error')}{': ' + message[0] if message else ''})"
    return Note("status", text, is_warning=True)


def _note_unattributed(peak: Peak) -> Note:
    size = peak.by_category().get(Category.UNATTRIBUTED.value, 0)
    share = format_share(size, peak.total_bytes)
    return Note("unattributed", f"{format_bytes(size)}, {share} of the peak", is_warning=bool(size))


def _note_inferred(peak: Peak) -> Note:
    inferred = peak.allocations.filter(~pl.col("exact"))
    size = int(inferred["size_bytes"].sum())
    count = "no blocks" if inferred.is_empty() else f"{len(inferred)} of {len(peak.allocations)}"
    if inferred.is_empty():
        return Note("inferred", f"{count}; every category at the peak was observed, none guessed")
    return Note(
        "inferred",
        f"{count} blocks at the peak, {format_bytes(size)} "
        f"({format_share(size, peak.total_bytes)}): their category was concluded from how they "
        "were used, not observed",
    )


def _note_other_devices(run: Run, peak: Peak) -> list[Note]:
    names = run.allocations["device"].cast(pl.String).unique().sort().to_list()
    notes = []
    for name in names:
        if name != peak.device:
            other = find_peak(run.attribution.allocations, device=name)
            notes.append(
                Note(
                    "devices",
                    f"{name} held memory too, at most {format_bytes(other.total_bytes)}; "
                    f"see it with --device {name}",
                )
            )
    return notes

"""What a dry run foretells for a device: whether it fits, who holds it, the wall, what helps."""

from dataclasses import dataclass

from attnprof.analysis.extrapolate import extrapolate, keep_blocks
from attnprof.analysis.laws import Law
from attnprof.analysis.peak import Peak
from attnprof.analysis.positions import PositionLimit, find_position_limit
from attnprof.analysis.wall import Probe, Wall, count_needed_bytes, find_wall
from attnprof.analysis.what_if.advice import Advice
from attnprof.report.growth_verdict import format_law
from attnprof.report.machine import Machine
from attnprof.report.notes import Note
from attnprof.report.summary import Holder, find_holders
from attnprof.run import Run
from attnprof.units import format_bytes

_MAX_ADVICE = 3


@dataclass(frozen=True, slots=True)
class Horizon:
    """How far a workload can grow, as two lengths tell."""

    law: Law | None
    """Of the live bytes at the peak; None if the lengths do not tell."""
    wall: Wall | None
    """None if there is none, or it cannot be told."""
    why_no_wall: str = ""
    limit: PositionLimit | None = None
    """How long a sequence can be at most, whatever memory there is, if that is known."""

    @property
    def is_limited(self) -> bool:
        """Whether a table of positions ends before memory does."""
        return self.limit is not None and (
            self.wall is None or self.limit.seq_len < self.wall.seq_len
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """A workload at one length on one device."""

    name: str
    """The workload."""
    seq_len: int
    machine: Machine
    peak: Peak
    """Of live bytes."""
    needed_bytes: int
    """What the allocator reserves for them, its cache and fragmentation included."""
    wanted_bytes: int
    """What it would reserve if it had no limit."""
    holders: tuple[Holder, ...]
    """Who holds the peak; they sum to it."""
    horizon: Horizon
    advice: tuple[Advice, ...]
    """What lowers the peak, the largest saving first."""
    about: tuple[str, ...]
    """What it was run with, in a few words each."""
    assumptions: tuple[str, ...]
    """What the dry run took for granted."""

    @property
    def fits(self) -> bool:
        """Whether the device has what is needed."""
        return self.needed_bytes <= self.machine.capacity_bytes


def predict(
    run: Run, machine: Machine, *, other: Run | None = None, why_no_other: str = ""
) -> Prediction:
    """Gather what a dry run foretells.

    Args:
        run: The dry run.
        machine: What it has to fit into.
        other: A dry run of the same workload at another length, for the law and the wall.
        why_no_other: Why there is none.
    """
    workload, dry = run.info["workload"], run.info["dry_run"]
    environment = run.info.get("environment") or {}
    peak = run.peak()
    horizon = (
        Horizon(None, None, why_no_other) if other is None else find_horizon(run, other, machine)
    )
    return Prediction(
        name=str(workload["make_step"]),
        seq_len=int(workload["seq_len"]),
        machine=machine,
        peak=peak,
        needed_bytes=count_needed_bytes(run.attribution.allocations, machine.capacity_bytes),
        wanted_bytes=count_needed_bytes(run.attribution.allocations),
        holders=tuple(find_holders(peak)),
        horizon=horizon,
        advice=tuple(run.advice()[:_MAX_ADVICE]),
        about=tuple(
            f"{key} {environment[key]}" for key in ("torch", "transformers") if environment.get(key)
        ),
        assumptions=tuple(str(text) for text in dry.get("assumptions") or ()),
    )


def find_horizon(run: Run, other: Run, machine: Machine) -> Horizon:
    """Extrapolate every block of two runs of one program, and find where a machine is full."""
    blocks = {
        int(each.info["workload"]["seq_len"]): keep_blocks(each.attribution.allocations)
        for each in (run, other)
    }
    program = extrapolate(blocks)
    if program is None:
        lengths = " and ".join(f"n = {n:,}" for n in sorted(blocks))
        return Horizon(
            None, None, f"other ops run at {lengths}; sweep more lengths with attnprof sweep"
        )
    law = program.law_at(int(run.info["workload"]["seq_len"]))
    limit = find_position_limit(
        {
            int(each.info["workload"]["seq_len"]): each.info["dry_run"].get("tables") or ()
            for each in (run, other)
        }
    )
    probe = Probe(lambda n, c: count_needed_bytes(program.blocks_at(n), c), "reserved")
    try:
        wall = find_wall(machine.capacity_bytes, program.estimate, fit=probe)
    except ValueError as error:  # everything fits
        return Horizon(law, None, str(error), limit)
    return Horizon(law, wall, limit=limit)


def write_prediction_verdict(prediction: Prediction) -> str:
    """Return whether it fits and by how much, in one sentence."""
    needed, capacity = prediction.needed_bytes, prediction.machine.capacity_bytes
    word, left = ("fits", "to spare") if prediction.fits else ("does not fit", "too few")
    return (
        f"n = {prediction.seq_len:,} {word} on {prediction.machine.name}: it needs "
        f"{format_bytes(needed)} and {format_bytes(capacity)} are available, "
        f"{format_bytes(abs(capacity - needed))} {left}."
    )


def write_horizon(prediction: Prediction) -> str:
    """Return the law and the wall in one sentence."""
    law, wall = prediction.horizon.law, prediction.horizon.wall
    parts = []
    if law is not None:
        parts.append(f"Around n = {prediction.seq_len:,} the peak is {format_law(law)}")
    limit = prediction.horizon.limit
    if limit is not None and prediction.horizon.is_limited:
        parts.append(
            f"all lengths fit that the workload can take, which end at n = {limit.seq_len:,} with "
            f"a table of {limit.rows:,} rows at {limit.at}"
        )
    elif wall is None:
        parts.append(f"no wall is known: {prediction.horizon.why_no_wall}")
    elif wall.seq_len:
        parts.append(f"the longest sequence that fits is n = {wall.seq_len:,}")
    else:
        parts.append("no length fits")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def collect_prediction_notes(prediction: Prediction) -> list[Note]:
    """Return the remarks on a prediction: how the wall was found, and what was assumed."""
    notes = [
        Note(
            "dry run",
            "the program itself ran, on tensors without values; of what kernels take inside "
            "themselves, that of attention and cuBLAS is counted",
        )
    ]
    if prediction.fits and prediction.wanted_bytes > prediction.needed_bytes:
        notes.append(
            Note(
                "tight",
                "the allocator has to give back what it caches and take it anew, which costs time; "
                f"it would rather have {format_bytes(prediction.wanted_bytes)}",
                is_warning=True,
            )
        )
    if prediction.horizon.wall is not None:
        condition = "if there were positions for it, " if prediction.horizon.is_limited else ""
        notes.append(Note("wall", condition + prediction.horizon.wall.sentence))
    notes += [Note("assumed", text) for text in prediction.assumptions]
    for advice in prediction.advice:
        notes += [Note("advice", f"{advice.title}: {text}") for text in advice.assumes]
    return notes

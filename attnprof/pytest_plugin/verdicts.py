"""Judge a test's runs by its budget and by what it forbids, and say what is wrong; pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from attnprof.pytest_plugin.held import NO_LAYER, Held, list_layers
from attnprof.pytest_plugin.marks import BUDGET, NO_SCORES, RESERVED, Budget
from attnprof.report.summary import LayerGroup, group_layers
from attnprof.run import Run
from attnprof.units import format_bytes
from attnprof.vocabulary import AttentionKind

_MOST_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Breach:
    """One limit that a test broke."""

    marker: str
    """The marker or option that sets the limit."""
    what: str
    """One line: what was limited, the limit, what was measured, the excess."""
    details: tuple[str, ...]
    """Who holds it, a line each."""
    run: Run | None
    """The run that shows it; None if it takes the runs of all lengths."""


def judge_budget(held: Held, budget: Budget) -> Iterator[Breach]:
    """Yield every limit of a budget that a run breaks, each with who holds the bytes."""
    for name, limit in budget.limits.items():
        if held.measure(name) > limit:
            yield breach_limit(held, BUDGET, name, limit, f"limit {format_bytes(limit)}")
    for name, limit in budget.per_layer.items():
        over = [(size, layer) for layer, size in held.measure_layers(name).items() if size > limit]
        if over:
            yield _breach_layer_limit(held, name, limit, over)


def breach_limit(held: Held, marker: str, name: str, limit: int, rule: str) -> Breach:
    """Return the breach of a limit on all layers together.

    Args:
        held: What the run held.
        marker: The marker or option that sets the limit.
        name: What is limited.
        limit: In bytes.
        rule: The limit in words.
    """
    size = held.measure(name)
    how = " (simulated)" if name == RESERVED and held.is_reserved_simulated else ""
    holders = held.find_holders(name)
    return Breach(
        marker,
        f"{name} was {format_bytes(size)}{how}, {rule}: {_describe_excess(size, limit)}",
        (f"{holders.when}:", *holders.lines),
        held.run,
    )


def _breach_layer_limit(
    held: Held, name: str, limit: int, over: Sequence[tuple[int, str]]
) -> Breach:
    size, layer = over[0]
    others = f"; {len(over)} layers break it" if len(over) > 1 else ""
    where = f"in {layer}" if layer else NO_LAYER
    return Breach(
        BUDGET,
        f"{name} was {format_bytes(size)} {where}, limit "
        f"{format_bytes(limit)} per layer: {_describe_excess(size, limit)}{others}",
        ("by layer:", *list_layers(held.measure_layers(name))),
        held.run,
    )


def _describe_excess(size: int, limit: int) -> str:
    excess = size - limit
    if not limit:
        return f"{format_bytes(excess)} too much"
    percent = 100 * excess / limit
    share = f"{percent:,.0f}" if percent >= 10 else f"{percent:.2g}" if percent >= 0.01 else "<0.01"
    return f"{format_bytes(excess)} ({share} %) too much"


def judge_scores(run: Run) -> Iterator[Breach]:
    """Yield a breach if any layer makes scores, with the reason for each.

    A layer that runs as one op does too, or may: its scores cannot be seen from outside.
    """
    layers = run.layers()
    kinds = (AttentionKind.MATERIALISED.value, AttentionKind.OPAQUE.value)
    made = layers.filter(pl.col("kind").is_in(kinds))
    if made.is_empty():
        return
    count = "1 attention layer makes" if len(made) == 1 else f"{len(made)} attention layers make"
    groups = group_layers(made)
    lines = [_describe_layer(group) for group in groups[:_MOST_LAYERS]]
    if len(groups) > _MOST_LAYERS:
        lines.append(f"{'':>12}  and {len(groups) - _MOST_LAYERS} more")
    what = f"{count} a score matrix, and none may"
    yield Breach(NO_SCORES, what, tuple(lines), run)


def _describe_layer(group: LayerGroup) -> str:
    row = group.row
    layer, reason = group.layer or NO_LAYER, row["backend_reason"]
    if row["kind"] == AttentionKind.OPAQUE:
        return f"{'unseen':>12}  {layer}: {reason}"
    each = ", each" if group.count > 1 else ""
    heads = "1 head" if row["heads"] == 1 else f"{row['heads']} heads"
    return (
        f"{format_bytes(row['scores_peak_bytes']):>12}  {layer}{each}: {row['q_len']} × "
        f"{row['k_len']} scores in {heads}; {reason}"
    )


def find_doubts(run: Run) -> Iterator[str]:
    """Yield what the run could not see or know, so that a limit may be kept only seemingly."""
    if run.has_compiled_code:
        yield "compiled code ran, and what its kernels take inside is not all counted"
    if run.has_uncompiled_code:
        yield "torch before 2.10 runs compiled code op by op under a trace: it takes other memory"
    for device, counted in (run.info.get("allocator") or {}).get("devices", {}).items():
        if held := counted.get("end", {}).get("private_bytes"):
            yield (
                f"private pools held {format_bytes(held)} of {device} (CUDA graphs, "
                "torch.cuda.MemPool), and what a replayed graph needs in there is not counted"
            )
    for assumption in (run.info.get("dry_run") or {}).get("assumptions", ()):
        yield f"this is a dry run, in which {assumption}"

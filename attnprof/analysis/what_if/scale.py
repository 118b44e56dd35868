"""Another batch size, another sequence length."""

from dataclasses import dataclass

import numpy as np

from attnprof.analysis.steps import describe_steps
from attnprof.analysis.what_if.scenario import Change, DoesNotApply, Options, Rewrite
from attnprof.analysis.what_if.scene import Scene
from attnprof.analysis.what_if.table import Table
from attnprof.attribution.phases import CODE as PHASE
from attnprof.units import require_countable
from attnprof.vocabulary import AttentionKind, Category, Phase, Role

_FIXED = (
    Category.PARAMETERS,
    Category.BUFFERS,
    Category.GRADIENTS,
    Category.OPTIMIZER_STATE,
    Category.PREEXISTING,
)
"""What has the size of the model, whatever is fed to it."""
_SQUARE = (Category.ATTENTION_SCORES, Category.SOFTMAX, Category.ATTENTION_MASK)
_MOST_TIMES = 64
"""A dimension is read as a multiple of a length up to this many times."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The sizes that dimensions of a step's tensors may stem from."""

    batch: int
    lengths: tuple[int, ...]
    """Sequence lengths, longest first."""
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Change:
    """How those sizes change."""

    batch: float = 1.0
    length: float = 1.0


@dataclass(frozen=True, slots=True)
class _Dimension:
    """A dimension as what it stems from: ``(B if has_batch else 1) · (times · length + rest)``."""

    has_batch: bool
    length: int
    """0 where it has nothing of a length."""
    times: int
    rest: int

    def resize(self, step: _Step, change: _Change) -> float:
        """Return how large it becomes."""
        length = max(1, round(self.length * change.length)) if self.length else 0
        batch = step.batch * change.batch if self.has_batch else 1.0
        return batch * (self.times * length + self.rest)


def scale_batch(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Scale the batch: every tensor by its dimensions that are the batch, or contain it.

    Known limitations:
        Dimensions are told by their sizes. Where a length is also the size of a feature, the
        last dimension is taken for the feature. With a batch of one, all that has tokens scales,
        but for what has the scores' shape: masks and biases are mostly the same for all.
    """
    assert options.batch is not None
    steps = _find_steps(scene)
    change = Change(
        title=f"A batch {options.batch:g} times as large",
        evidence="the batch is " + ", ".join(map(str, sorted({s.batch for s in steps.values()}))),
        how="the batch size, with gradient accumulation to keep the effective one; "
        "attnprof.dry_run runs the program with it and needs no memory",
        assumes=("tensors are as many, and each scales by the dimensions that are the batch",),
        exact=False,
    )
    return _scale(scene, table, steps, _Change(batch=options.batch)), change


def scale_length(scene: Scene, table: Table, options: Options) -> Rewrite:
    """Scale the sequence length: every tensor by its dimensions that are n, or contain it.

    The longest sequence of the run gets the length asked for, others in proportion.

    Known limitations:
        As for the batch. A decoding run would take more steps instead, and so does not apply.
    """
    assert options.seq_len is not None
    if scene.table.is_in(Phase.DECODE).any():
        raise DoesNotApply(
            "the run decodes token by token, and longer sequences take more steps; record it at "
            "that length"
        )
    steps = _find_steps(scene)
    longest = max((step.lengths[0] for step in steps.values() if step.lengths), default=0)
    if not longest:
        raise DoesNotApply("the length of the run's sequences is not known")
    change = Change(
        title=f"Sequences of {options.seq_len} tokens",
        evidence=f"the longest sequence has {longest} tokens",
        how=f"attnprof.dry_run(make_step, seq_len={options.seq_len}) runs the program at that "
        "length and needs no memory",
        assumes=("tensors are as many, and each scales by the dimensions that are tokens",),
        exact=False,
    )
    return _scale(scene, table, steps, _Change(length=options.seq_len / longest)), change


def _find_steps(scene: Scene) -> dict[int, _Step]:
    """Return per step the batch, lengths and heads of its attention, else of its data."""
    timeline = scene.attribution.timeline
    described = describe_steps(scene.attribution, device=scene.device)
    batch = dict(described.select("step", "batch").iter_rows())
    lengths: dict[int, set[int]] = {
        step: {n} if n else set() for step, n in described.select("step", "seq_len").iter_rows()
    }
    heads: dict[int, set[int]] = {step: set() for step in lengths}
    for call in scene.calls:
        step = int(timeline.step_of(np.array([call.ops[0]]))[0])
        if call.kind in (AttentionKind.MATERIALISED, AttentionKind.FUSED):
            lengths[step] |= {call.q_len, call.k_len}
            heads[step] |= {call.heads, call.kv_heads}
    return {
        step: _Step(
            batch[step] or 1,
            tuple(sorted((n for n in lengths[step] if n > 1), reverse=True)),
            tuple(sorted(heads[step] - {0, 1}, reverse=True)),
        )
        for step in lengths
    }


def _scale(scene: Scene, table: Table, steps: dict[int, _Step], change: _Change) -> Table:
    """Return the table with every block resized.

    Raises:
        ValueError: Together they would have 2^63 bytes or more.
    """
    parameters = _find_parameter_shapes(scene)
    step = scene.attribution.allocations["step"].to_numpy()[table.block]
    signature = scene.attribution.blocks.signature[table.block]
    fixed = table.is_of(*_FIXED) | (table.phase == PHASE[Phase.OPTIMIZER]) | (signature < 0)
    # (block, 4): what a factor depends on
    kinds = (table.is_of(*_SQUARE), table.is_of(Category.ATTENTION_MASK))
    keys = np.stack([step, signature, *kinds], axis=1)[~fixed]
    distinct, of = np.unique(keys, axis=0, return_inverse=True)
    factors = np.array(
        [
            _find_factor(
                scene.facts.signatures[s].shape,
                steps[at],
                parameters,
                change,
                lengths=2 if is_square else 1,
                has_batch=not is_mask,
            )
            for at, s, is_square, is_mask in distinct.tolist()
        ]
    )
    size = table.size_bytes.astype(np.float64)
    size[~fixed] *= factors[of.ravel()] if len(factors) else 1.0
    require_countable(size.sum(), "the blocks would", "a smaller batch or length")
    return table.resize(~fixed, np.ceil(size).astype(np.int64))


def _find_parameter_shapes(scene: Scene) -> frozenset[tuple[int, ...]]:
    """Return the shapes of parameters."""
    facts = scene.facts
    storages = {s for s, role in scene.roles.items() if role == Role.PARAMETER}
    blocks = scene.attribution.blocks
    rows = np.isin(blocks.storage, list(storages)) & (blocks.signature >= 0)
    return frozenset(facts.signatures[s].shape for s in np.unique(blocks.signature[rows]).tolist())


def _find_factor(
    shape: tuple[int, ...],
    step: _Step,
    parameters: frozenset[tuple[int, ...]],
    change: _Change,
    *,
    lengths: int,
    has_batch: bool,
) -> float:
    """Return by how much a tensor grows.

    At most one dimension has the batch: the outermost that can.

    Args:
        shape: The tensor's shape.
        step: The sizes that its dimensions may stem from.
        parameters: The shapes of parameters: what has one of them, and at most one length, does
            not grow.
        change: How those sizes change.
        lengths: At most so many dimensions have a length.
        has_batch: With a batch of one, which has no dimension to be seen, whether it has one.
    """
    if lengths == 1 and shape in parameters:
        return 1.0
    if lengths == 2 and (pair := _find_folded(shape, step)):
        queries, keys = (max(1, round(n * change.length)) / n for n in pair)
        return queries * keys * change.batch
    features = frozenset(size for of in parameters for size in of)
    read = [
        _read_dimension(size, step, features, is_first=at == 0) for at, size in enumerate(shape)
    ]
    with_length = [at for at, dimension in enumerate(read) if dimension and dimension.length]
    while len(with_length) > lengths:
        # Where n is also the size of a feature, the last dimension is the feature.
        doubtful = [at for at in with_length if shape[at] in features]
        with_length.remove((doubtful or with_length)[-1])
    with_batch = next((at for at, d in enumerate(read) if d and d.has_batch), -1)
    factor = 1.0
    for at, dimension in enumerate(read):
        if dimension and (at in with_length or at == with_batch):
            factor *= dimension.resize(step, change) / shape[at]
    is_hidden = has_batch and step.batch == 1 and bool(with_length)
    return factor * change.batch if is_hidden else factor


def _find_folded(shape: tuple[int, ...], step: _Step) -> tuple[int, int] | None:
    """Return both lengths of scores whose batch, queries and keys are one dimension.

    So they are where their features are projected (additive attention).
    """
    if len(shape) != 2 or shape[1] in step.lengths:
        return None
    pairs = ((q, k) for q in step.lengths for k in step.lengths)
    return next(((q, k) for q, k in pairs if shape[0] == step.batch * q * k), None)


def _read_dimension(
    size: int, step: _Step, features: frozenset[int], *, is_first: bool
) -> _Dimension | None:
    """Return what a dimension stems from, by its size; None for a feature, or what is unknown.

    Args:
        size: Its size.
        step: The sizes that it may stem from.
        features: The sizes of parameters' dimensions.
        is_first: Whether it is the outermost; those are tokens of the whole batch rather than of
            one sequence, where both have the same number.
    """
    if size < 2:
        return None
    batch = step.batch
    for has_batch in (True, False) if is_first else (False, True):
        found = _match_length(size, step, features, has_batch=has_batch)
        if found is not None:
            return found
    if batch > 1 and size in {batch, *(batch * heads for heads in step.heads)}:
        return _Dimension(has_batch=True, length=0, times=0, rest=size // batch)
    if size in features:
        return None
    for length in step.lengths:
        if size == 2 * length - 1:  # relative positions
            return _Dimension(has_batch=False, length=length, times=2, rest=-1)
        for part in (batch, 1):
            times, rest = divmod(size, part * length)
            if not rest and times <= _MOST_TIMES:
                return _Dimension(has_batch=part > 1, length=length, times=times, rest=0)
    return None


def _match_length(
    size: int, step: _Step, features: frozenset[int], *, has_batch: bool
) -> _Dimension | None:
    """Return a dimension as a length give or take one, times the batch where that is wanted.

    Labels are shifted by one; a token for the whole is put in front.
    """
    if has_batch and step.batch < 2:
        return None
    for length in step.lengths:
        for rest in (0, -1, 1):
            is_feature = rest != 0 and size in features
            if size == (step.batch if has_batch else 1) * (length + rest) and not is_feature:
                return _Dimension(has_batch=has_batch, length=length, times=1, rest=rest)
    return None

"""What the markers of a test ask for, read and checked when the test is collected."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from attnprof.units import parse_bytes, parse_length
from attnprof.vocabulary import Category

BUDGET = "memory_budget"
GROWTH = "memory_growth"
NO_SCORES = "no_materialised_scores"

PEAK = "peak"
RESERVED = "reserved"
SAVED_SOFTMAX = "saved_softmax"
KV_PER_TOKEN = "kv_cache_per_token"
LEAKED = "leaked"
TOTAL = "total"
LIMITS = (PEAK, RESERVED, SAVED_SOFTMAX, KV_PER_TOKEN, LEAKED, *(c.value for c in Category))
"""What ``memory_budget`` limits, beside ``per_layer``."""
PER_LAYER = (SAVED_SOFTMAX, KV_PER_TOKEN, *(c.value for c in Category))
"""What can be limited for each layer by itself."""
EXPONENTS = {"constant": 0.0, "linear": 1.0, "quadratic": 2.0}
"""The laws that ``memory_growth`` knows by name."""

HELP = (
    f"{BUDGET}(peak=None, *, saved_softmax=None, leaked=None, per_layer=None, **categories): "
    "fail the test if it holds more memory at once than this, in bytes or text such as '1.5 GiB'",
    f"{GROWTH}(seq_lens, *, category='total', at_most=None, exponent=None, layer=None, "
    "make_step=None, dry_run=False): run the test at every length, as its argument seq_len, and "
    "fail it if memory grows faster than 'constant', 'linear', 'quadratic' or an exponent",
    f"{NO_SCORES}(): fail the test if an attention layer makes a score matrix",
)


@dataclass(frozen=True, slots=True)
class Budget:
    """How many bytes a test may hold."""

    limits: Mapping[str, int] = field(default_factory=dict)
    """By one of `LIMITS`."""
    per_layer: Mapping[str, int] = field(default_factory=dict)
    """By one of `PER_LAYER`: what any single layer may hold."""


@dataclass(frozen=True, slots=True)
class GrowthLaw:
    """How fast memory may grow with the sequence length."""

    seq_lens: tuple[int, ...]
    category: str
    layer: str | None
    most_exponent: float
    name: str
    """The law as the marker gives it."""
    make_step: Callable[[int, str], Callable[[], object]] | None
    """What to run; None for the test itself."""
    is_dry: bool


@dataclass(frozen=True, slots=True)
class Checks:
    """All that a test's markers ask for."""

    budget: Budget | None
    growth: GrowthLaw | None
    forbids_scores: bool


def read_checks(item: pytest.Item) -> Checks | None:
    """Return what the markers of a test ask for; None if it has none of ours.

    Where a test and its class both have a budget, the closer one wins limit by limit.

    Raises:
        pytest.UsageError: A marker's arguments cannot be used; says where the marker is.
    """
    budgets: list[Budget] = []
    growth: GrowthLaw | None = None
    forbids_scores = False
    for node, mark in item.iter_markers_with_node():  # the closest first
        if mark.name not in (BUDGET, GROWTH, NO_SCORES):
            continue
        try:
            if mark.name == BUDGET:
                budgets.append(_read_budget(mark))
            elif mark.name == GROWTH:
                growth = growth or _read_growth(mark, item)
            else:
                _refuse_arguments(mark)
                forbids_scores = True
        except (TypeError, ValueError) as error:
            raise pytest.UsageError(f"{_locate(node, mark, item)}: {mark.name}: {error}") from None
    if not budgets and growth is None and not forbids_scores:
        return None
    return Checks(_merge(budgets) if budgets else None, growth, forbids_scores)


def _read_budget(mark: pytest.Mark) -> Budget:
    if len(mark.args) > 1:
        raise TypeError("takes one limit without a name, the peak; name the others")
    limits = dict(mark.kwargs)
    if mark.args:
        if PEAK in limits:
            raise TypeError("got the peak twice")
        limits[PEAK] = mark.args[0]
    per_layer = limits.pop("per_layer", None) or {}
    if not isinstance(per_layer, Mapping):
        raise TypeError(
            f"per_layer must be a dict such as {{'softmax': '4 MiB'}}, got {per_layer!r}"
        )
    if not limits and not per_layer:
        raise TypeError("limits nothing; give a limit, such as peak='1.5 GiB' or softmax=0")
    return Budget(_read_limits(limits, LIMITS), _read_limits(per_layer, PER_LAYER))


def _read_limits(limits: Mapping[str, Any], known: Iterable[str]) -> dict[str, int]:
    read = {}
    for name, limit in limits.items():
        if name not in known:
            raise ValueError(f"there is no {name!r} to limit; there are {', '.join(known)}")
        if limit is None:
            continue
        try:
            read[str(name)] = parse_bytes(limit)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return read


def _merge(budgets: list[Budget]) -> Budget:
    limits: dict[str, int] = {}
    per_layer: dict[str, int] = {}
    for budget in reversed(budgets):
        limits |= budget.limits
        per_layer |= budget.per_layer
    return Budget(limits, per_layer)


def _read_growth(mark: pytest.Mark, item: pytest.Item) -> GrowthLaw:
    def read(
        seq_lens: Iterable[int | str],
        *,
        category: str = TOTAL,
        at_most: str | None = None,
        exponent: float | None = None,
        layer: str | None = None,
        make_step: Callable[[int, str], Callable[[], object]] | None = None,
        dry_run: bool = False,
    ) -> GrowthLaw:
        known = (TOTAL, *(c.value for c in Category))
        if category not in known:
            raise ValueError(f"there is no category {category!r}; there are {', '.join(known)}")
        if make_step is not None and not callable(make_step):
            raise TypeError(f"make_step must be a function, got {make_step!r}")
        _require_lengths(item, make_step)
        most = _read_exponent(at_most, exponent)
        name = at_most or f"n^{exponent}"
        lengths = _read_lengths(seq_lens)
        return GrowthLaw(lengths, category, layer, most, name, make_step, dry_run)

    try:
        inspect.signature(read).bind(*mark.args, **mark.kwargs)
    except TypeError as error:
        raise TypeError(f"{error}; write seq_lens=[256, 512, 1024], at_most='linear'") from None
    return read(*mark.args, **mark.kwargs)


def _read_exponent(at_most: str | None, exponent: float | None) -> float:
    if (at_most is None) == (exponent is None):
        raise TypeError("give either at_most, such as 'linear', or exponent, such as 1.1")
    if at_most is not None:
        if at_most not in EXPONENTS:
            raise ValueError(f"at_most must be one of {', '.join(EXPONENTS)}, got {at_most!r}")
        return EXPONENTS[at_most]
    if isinstance(exponent, bool) or not isinstance(exponent, int | float):
        raise TypeError(f"exponent must be a number, got {exponent!r}")
    if not 0 <= exponent < 10:
        raise ValueError(f"exponent must be between 0 and 10, got {exponent!r}")
    return float(exponent)


def _read_lengths(seq_lens: object) -> tuple[int, ...]:
    if isinstance(seq_lens, str) or not isinstance(seq_lens, Iterable):
        raise TypeError(f"seq_lens must be a list such as [256, 512, 1024], got {seq_lens!r}")
    lengths = tuple(sorted(parse_length(length) for length in seq_lens))
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"seq_lens has a length twice: {list(lengths)}")
    if len(lengths) < 3:
        raise ValueError(f"seq_lens must have three lengths or more to tell laws, got {lengths}")
    return lengths


def _require_lengths(item: pytest.Item, make_step: object) -> None:
    """Raise if a test cannot be told the length."""
    if make_step is not None:
        return
    parameters = inspect.signature(item.obj).parameters  # type: ignore[attr-defined]  # a function
    if "seq_len" not in parameters:
        raise TypeError("the test must take seq_len as an argument, or the marker make_step=")


def _refuse_arguments(mark: pytest.Mark) -> None:
    if mark.args or mark.kwargs:
        raise TypeError("takes no arguments")


def _locate(node: Any, mark: pytest.Mark, item: pytest.Item) -> str:
    """Return ``file:line`` of a marker: the line in its test, class or module that names it."""
    path, line, _ = item.location
    source = getattr(node, "obj", None)
    try:
        lines, first = inspect.getsourcelines(source)
    except (OSError, TypeError):
        lines, first = [], 0
    for offset, text in enumerate(lines):
        if mark.name in text:
            line = max(first, 1) + offset - 1
            break
    return f"{path}:{(line or 0) + 1}"

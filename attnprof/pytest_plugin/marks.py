"""What the markers of a test ask for, read and checked when the test is collected."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from attnprof.pytest_plugin.places import locate_marker
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
_CATEGORIES = tuple(category.value for category in Category)
LIMITS = (PEAK, RESERVED, SAVED_SOFTMAX, KV_PER_TOKEN, LEAKED, *_CATEGORIES)
"""What ``memory_budget`` limits, beside ``per_layer``."""
PER_LAYER = (SAVED_SOFTMAX, KV_PER_TOKEN, *_CATEGORIES)
"""What can be limited for each layer by itself."""
LAWS = ("constant", "linear", "quadratic")
"""The laws that ``memory_growth`` knows by name."""
_MOST_EXPONENT = 10

SEQ_LEN = "seq_len"
"""The argument by which a test with a growth law is told the length."""

HELP = (
    f"{BUDGET}(peak, *, saved_softmax, leaked, reserved, kv_cache_per_token, per_layer, "
    "**categories): fail the test if it holds more memory than this, in bytes or text such as "
    "'1.5 GiB'",
    f"{GROWTH}(seq_lens, *, category='total', at_most, exponent, make_step, dry_run=False): run "
    "the test at every length, as its argument seq_len, and fail it if memory grows faster than "
    "at_most='constant', 'linear' or 'quadratic', or than an exponent",
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
    """How fast the bytes of a category may grow with the sequence length n."""

    category: str
    """A `Category`, or ``"total"``."""
    at_most: str | None
    """One of `LAWS`; None if there is an exponent."""
    exponent: float | None

    def __str__(self) -> str:
        return self.at_most if self.at_most is not None else f"n^{self.exponent:g}"


@dataclass(frozen=True, slots=True)
class Lengths:
    """At which lengths a test is run, and how."""

    seq_lens: tuple[int, ...]
    """Ascending."""
    make_step: Callable[[int, str], Callable[[], object]] | None
    """What to run; None for the test itself."""
    is_dry: bool
    """Run it on fake tensors, which takes no memory."""


@dataclass(frozen=True, slots=True)
class Checks:
    """All that a test's markers ask for."""

    budget: Budget | None = None
    forbids_scores: bool = False
    laws: tuple[GrowthLaw, ...] = ()
    lengths: Lengths | None = None
    """What ``laws`` are fitted to; None without any."""

    @property
    def runs_test_by_length(self) -> bool:
        """Whether the test itself is run at every length."""
        return self.lengths is not None and self.lengths.make_step is None


class SetByMarker:
    """What collection passes as ``seq_len`` in place of the lengths, which the one test runs."""

    def __repr__(self) -> str:
        return f"<seq_len, set by {GROWTH} when the test runs>"


def read_checks(item: pytest.Item) -> Checks | None:
    """Return what the markers of a test ask for; None if it has none of ours.

    Where a test and its class both have a budget, the closer one wins limit by limit. Laws of
    growth on a test replace those of its class.

    Raises:
        pytest.UsageError: A marker's arguments cannot be used; says where the marker is.
    """
    checks: Checks | None = None
    growth_node: Any = None
    for node, mark in item.iter_markers_with_node():  # the closest first
        if mark.name not in (BUDGET, GROWTH, NO_SCORES):
            continue
        checks = checks or Checks()
        try:
            if mark.name == BUDGET:
                checks = _add_budget(checks, _read_budget(mark))
            elif mark.name == NO_SCORES:
                _refuse_arguments(mark)
                checks = replace(checks, forbids_scores=True)
            else:
                law, lengths = _read_growth(mark, item)
                if growth_node in (None, node):
                    checks = _add_law(checks, law, lengths)
                    growth_node = node
        except (TypeError, ValueError) as error:
            place = locate_marker(node, mark, item)
            raise pytest.UsageError(f"{place}: {mark.name}: {error}") from None
    return checks


def _add_budget(checks: Checks, further: Budget) -> Checks:
    closer = checks.budget or Budget()
    limits = {**further.limits, **closer.limits}
    return replace(checks, budget=Budget(limits, {**further.per_layer, **closer.per_layer}))


def _add_law(checks: Checks, law: GrowthLaw, lengths: Lengths) -> Checks:
    if checks.lengths not in (None, lengths):
        raise ValueError(
            "the laws of one test must agree on seq_lens, make_step and dry_run; write a test for "
            "each that differs"
        )
    return replace(checks, laws=(*checks.laws, law), lengths=lengths)


def _read_budget(mark: pytest.Mark) -> Budget:
    if len(mark.args) > 1:
        raise TypeError("takes one limit without a name, the peak; name the others")
    limits = dict(mark.kwargs)
    if mark.args:
        if PEAK in limits:
            raise TypeError("got the peak twice")
        limits[PEAK] = mark.args[0]
    per_layer = limits.pop("per_layer", {})
    if not isinstance(per_layer, Mapping):
        raise TypeError(
            f"per_layer must be a dict such as {{'softmax': '4 MiB'}}, got {per_layer!r}"
        )
    if not limits and not per_layer:
        raise TypeError("limits nothing; give a limit, such as peak='1.5 GiB' or softmax=0")
    return Budget(_read_limits(limits, LIMITS), _read_limits(per_layer, PER_LAYER))


def _read_limits(limits: Mapping[Any, Any], known: Collection[str]) -> dict[str, int]:
    read = {}
    for name, limit in limits.items():
        if name not in known:
            raise ValueError(f"there is no {name!r} to limit; there are {', '.join(known)}")
        try:
            read[str(name)] = parse_bytes(limit)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    return read


def _read_growth(mark: pytest.Mark, item: pytest.Item) -> tuple[GrowthLaw, Lengths]:
    try:
        inspect.signature(_make_growth).bind(*mark.args, **mark.kwargs)
    except TypeError as error:
        raise TypeError(f"{error}; write seq_lens=[256, 512, 1024], at_most='linear'") from None
    law, lengths = _make_growth(*mark.args, **mark.kwargs)
    if lengths.make_step is None:
        _require_seq_len(item, is_dry=lengths.is_dry)
    elif SEQ_LEN in _find_parameters(item) and SEQ_LEN not in _find_given(item):
        raise TypeError(
            f"{item.name} takes seq_len, but make_step is what is run at every length, and the "
            "test once beside it; leave out one of the two"
        )
    return law, lengths


def _make_growth(
    seq_lens: Collection[int | str],
    *,
    category: str = TOTAL,
    at_most: str | None = None,
    exponent: float | None = None,
    make_step: Callable[[int, str], Callable[[], object]] | None = None,
    dry_run: bool = False,
) -> tuple[GrowthLaw, Lengths]:
    known = (TOTAL, *_CATEGORIES)
    if category not in known:
        raise ValueError(f"there is no category {category!r}; there are {', '.join(known)}")
    if make_step is not None:
        _check_make_step(make_step)
    if not isinstance(dry_run, bool):
        raise TypeError(f"dry_run must be True or False, got {dry_run!r}")
    law = GrowthLaw(category, *_read_law(at_most, exponent))
    return law, Lengths(_read_lengths(seq_lens), make_step, dry_run)


def _check_make_step(make_step: object) -> None:
    if not callable(make_step):
        raise TypeError(f"make_step must be a function, got {make_step!r}")
    try:
        inspect.signature(make_step).bind(1, "cpu")
    except ValueError:  # a builtin that has no signature to read
        pass
    except TypeError as error:
        raise TypeError(
            f"make_step cannot be called as make_step(seq_len, device): {error}"
        ) from None


def _read_law(at_most: object, exponent: object) -> tuple[str | None, float | None]:
    if (at_most is None) == (exponent is None):
        raise TypeError("give either at_most, such as 'linear', or exponent, such as 1.1")
    if at_most is not None:
        if not isinstance(at_most, str) or at_most not in LAWS:
            raise ValueError(f"at_most must be one of {', '.join(LAWS)}, got {at_most!r}")
        return at_most, None
    if isinstance(exponent, bool) or not isinstance(exponent, int | float):
        raise TypeError(f"exponent must be a number, got {exponent!r}")
    if not 0 <= exponent <= _MOST_EXPONENT:
        raise ValueError(f"exponent must be between 0 and {_MOST_EXPONENT}, got {exponent!r}")
    return None, float(exponent)


def _read_lengths(seq_lens: object) -> tuple[int, ...]:
    # An iterator would be empty for the second test that shares the marker.
    if isinstance(seq_lens, str | bytes) or not isinstance(seq_lens, Collection):
        raise TypeError(f"seq_lens must be a list such as [256, 512, 1024], got {seq_lens!r}")
    lengths = sorted(parse_length(length) for length in seq_lens)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"seq_lens has a length twice: {lengths}")
    if len(lengths) < 3:
        raise ValueError(
            f"seq_lens must have three lengths or more, got {lengths}: two points lie on a line "
            "and on a parabola alike"
        )
    return tuple(lengths)


def _require_seq_len(item: pytest.Item, *, is_dry: bool) -> None:
    """Raise if a test cannot be told the length when it runs."""
    if SEQ_LEN not in _find_parameters(item):
        raise TypeError(
            f"{item.name} must take seq_len as an argument without a default, or the marker "
            "make_step="
        )
    if is_dry and inspect.iscoroutinefunction(getattr(item, "obj", None)):
        raise TypeError("dry_run=True cannot run an async test; give make_step=")
    if not isinstance(_find_given(item).get(SEQ_LEN), SetByMarker):
        raise ValueError(
            f"seq_len of {item.name} is also set elsewhere (a parametrize or a fixture); leave it "
            f"to {GROWTH}, which runs the test at every length"
        )
    for name, definitions in _find_fixtures(item).items():
        if any(SEQ_LEN in definition.argnames for definition in definitions):
            raise ValueError(
                f"the fixture {name!r} takes seq_len, but is set up once for all lengths; build "
                "what depends on the length in the test, or give make_step="
            )


def _find_parameters(item: pytest.Item) -> Collection[str]:
    """Return the names of the arguments that a test has to be given."""
    body = getattr(item, "obj", None)
    taken = inspect.signature(body).parameters.values() if callable(body) else ()
    return [parameter.name for parameter in taken if parameter.default is parameter.empty]


def _find_given(item: pytest.Item) -> Mapping[str, Any]:
    """Return what a test gets from its parametrize, and the definitions of its fixtures."""
    parameters: Mapping[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return {**_find_fixtures(item), **parameters}


def _find_fixtures(item: pytest.Item) -> Mapping[str, Any]:
    """Return the definitions of the fixtures that a test uses, by name."""
    known = getattr(item, "_fixtureinfo", None)  # no public way; other plugins read it too
    return getattr(known, "name2fixturedefs", {})


def _refuse_arguments(mark: pytest.Mark) -> None:
    if mark.args or mark.kwargs:
        raise TypeError("takes no arguments")

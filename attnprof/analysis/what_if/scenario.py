"""What a scenario is: a change to the program, and what it would make of the blocks."""

from collections.abc import Callable
from dataclasses import dataclass

from attnprof.analysis.what_if.scene import Scene
from attnprof.analysis.what_if.table import Table


class DoesNotApply(ValueError):
    """A scenario has nothing to change in a run; the message says why, in one line."""

    def __init__(self, reason: str, scenario: str = "") -> None:
        """Say why.

        Args:
            reason: What of the run rules the scenario out.
            scenario: Its name; scenarios themselves leave that to whom asked for them.
        """
        self.reason = reason
        super().__init__(f"{scenario} does not apply to this run: {reason}" if scenario else reason)


@dataclass(frozen=True, slots=True)
class Options:
    """The numbers that some scenarios need."""

    kv_heads: int | None = None
    """Key/value heads per layer."""
    batch: float | None = None
    """Factor on the batch size."""
    seq_len: int | None = None
    """The sequence length n."""
    latent_dim: int | None = None
    """Elements kept per token and layer in place of K and V."""
    applied: frozenset[str] = frozenset()
    """The names of all scenarios that are replayed together."""


@dataclass(frozen=True, slots=True)
class Change:
    """What there is to say about a scenario in one run."""

    title: str
    """The change, in a few words."""
    evidence: str
    """What in the run it acts on."""
    how: str
    """The option or line of code that does it."""
    layers: tuple[str, ...] = ()
    """The layers it acts on; empty where it is none or all."""
    assumes: tuple[str, ...] = ()
    """What the program is taken to do, that the run cannot show."""
    exact: bool = True
    """False where sizes are estimated rather than read off the run."""


Rewrite = tuple[Table, Change]
"""What a scenario makes of a table, and what there is to say about it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A change to a program that can be replayed."""

    name: str
    apply: Callable[[Scene, Table, Options], Rewrite]
    """Rewrites a table, or raises `DoesNotApply`."""
    needs: str = ""
    """The field of `Options` without which there is nothing to replay; such a scenario is asked
    for, never advised."""
    choice: str = ""
    """What the scenario decides: of several that decide the same, one can be replayed."""

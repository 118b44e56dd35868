"""Show a growth: as text, as JSON, and as a page. What ``sweep`` and ``report`` have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnprof.growth import Growth


@dataclass(frozen=True, slots=True)
class GrowthOptions:
    """What a user wants to see of a growth."""

    capacities: Sequence[str] = ()
    """What a step has to fit into."""
    category: str | None = None
    """The category to speak of; all live bytes without it."""
    as_json: bool = False
    html: Path | None = None
    """Where to write a page."""

    def check(self, *, out: Path | None = None) -> None:
        """Raise if a growth cannot be shown so, before it costs anything.

        Args:
            out: A directory that is to be made, in which the page may lie.

        Raises:
            CommandError: The page cannot be written.
            ValueError: A capacity is neither a size nor a known device, or there is no such
                category.
        """
        from attnprof.growth import read_capacity
        from attnprof.report.growth_gather import check_focus

        for capacity in self.capacities:
            read_capacity(capacity)
        if self.category is not None:
            check_focus(self.category)
        if self.html is not None and out not in self.html.parents:
            from attnprof.files import check_can_write

            check_can_write(self.html)


def show_growth(growth: "Growth", options: GrowthOptions, *, is_quiet: bool = False) -> None:
    """Print a growth report, and write its page if one is asked for.

    Args:
        growth: The growth.
        options: What to show.
        is_quiet: Print no text; the page is all that is wanted.
    """
    from attnprof.analysis.fits import TOTAL
    from attnprof.cli.console import print_report, say, working
    from attnprof.report.growth_gather import summarise_growth

    with working("reading the runs …"):
        summary = summarise_growth(
            growth, capacities=options.capacities, focus=options.category or TOTAL
        )
    if options.as_json:
        from attnprof.report.growth_json import render_growth_json

        print(render_growth_json(summary))
    elif not is_quiet:
        from attnprof.report.growth_text import render_growth_text

        print_report(render_growth_text(summary))
    if options.html is not None:
        from attnprof.files import replace_file
        from attnprof.report.growth_html import render_growth_html

        assert summary.path is not None  # what the command line shows is on disk
        replace_file(options.html, render_growth_html(summary), keep_out_of=summary.path)
        say(f"wrote {options.html}")

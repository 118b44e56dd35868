"""``attnprof compare``: two runs, each at its own peak, and what makes the difference."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attnprof.analysis.peak import Peak
    from attnprof.report.compare import Change


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="FIRST", help="A recorded run.", show_default=False)
    ],
    second: Annotated[
        Path,
        typer.Argument(metavar="SECOND", help="The run to hold against it.", show_default=False),
    ],
    allow: Annotated[
        float,
        typer.Option(
            metavar="PERCENT", min=0, help="By how much the second peak may be the higher one."
        ),
    ] = 0.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
) -> int:
    """Say what two runs hold at their peaks and what differs, category by category.

    Ends with exit code 1 if the second peak is higher than is allowed. The dashboard's page Compare
    shows the same numbers.
    """
    from attnprof.cli.console import print_report, working
    from attnprof.report.compare import compare_peaks, describe_change

    with working("reading the runs …"):
        peaks = [_find_peak(path) for path in (first, second)]
        changes = compare_peaks(*peaks)
    before, after = (peak.total_bytes for peak in peaks)
    if as_json:
        import json

        values = {
            "format_version": 1,
            "first_bytes": before,
            "second_bytes": after,
            "difference_bytes": after - before,
            "by_category": [describe_change(change, "category") for change in changes],
            "by_layer": [describe_change(change, "layer") for change in _compare_layers(*peaks)],
        }
        print(json.dumps(values, indent=2))
    else:
        from attnprof.report.compare_text import render_changes

        print_report(render_changes(changes, first=str(first), second=str(second)))
    return int(after > before * (1 + allow / 100))


def _find_peak(path: Path) -> "Peak":
    """Return a run's peak.

    Raises:
        CommandError: Nothing was recorded, so a comparison would call it the smaller one.
    """
    from attnprof.cli.opening import require_peak, say_what_is_missing
    from attnprof.run import load

    run = load(path)
    peak = require_peak(run, path)
    say_what_is_missing(run, path)
    return peak


def _compare_layers(*peaks: "Peak") -> "list[Change]":
    from attnprof.report.compare import list_changes

    held = [Counter[str](), Counter[str]()]
    for sizes, peak in zip(held, peaks, strict=True):
        for layer, _category, size in peak.by_layer().iter_rows():
            sizes[layer] += size
    return list_changes(*held)

"""``attnprof compare``: two runs, each at its own peak, and what makes the difference."""

from pathlib import Path
from typing import Annotated

import typer


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
    from attnprof.report.compare import compare_peaks
    from attnprof.run import load

    with working("reading the runs …"):
        peaks = [load(path).peak() for path in (first, second)]
        changes = compare_peaks(*peaks)
    before, after = (peak.total_bytes for peak in peaks)
    if as_json:
        import json

        parts = [
            {
                "category": c.category,
                "first_bytes": c.first_bytes,
                "second_bytes": c.second_bytes,
                "difference_bytes": c.difference_bytes,
            }
            for c in changes
        ]
        values = {
            "format_version": 1,
            "first_bytes": before,
            "second_bytes": after,
            "difference_bytes": after - before,
            "by_category": parts,
        }
        print(json.dumps(values, indent=2))
    else:
        from attnprof.report.compare_text import render_changes

        print_report(render_changes(changes, first=str(first), second=str(second)))
    return int(after > before * (1 + allow / 100))

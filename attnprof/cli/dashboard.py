"""``attnprof dashboard``: recorded runs in a browser."""

import os
import shlex
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from attnprof.errors import CommandError

NEEDED = ("attnprof_dashboard", "dash", "dash_mantine_components", "waitress")
"""The modules without which there is no dashboard."""


def dashboard(
    runs: Annotated[
        Path,
        typer.Argument(
            metavar="[RUNS_DIR]", help="A directory of runs and sweeps, or one of them."
        ),
    ] = Path("runs"),
    port: Annotated[int, typer.Option(metavar="N", help="0: any that is free.", min=0)] = 8050,
    host: Annotated[
        str,
        typer.Option(metavar="H", help="The address to bind; for other machines give --token too."),
    ] = "127.0.0.1",
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address and open nothing.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="The secret that browsers must know. Without it: a new one.",
            envvar="ATTNPROF_DASHBOARD_TOKEN",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Show runs in a browser: whose bytes were at the peak, when, and how they grow.

    Runs are only read, and one that is still being recorded can be followed. Only this machine is
    served, and only browsers that know the address with its token. Ctrl-C ends it.
    """
    missing = find_missing(NEEDED)
    if missing:
        raise CommandError(
            f"the dashboard needs {', '.join(missing)}; pip install 'attnprof[dashboard]'"
        )
    from attnprof.cli.console import say
    from attnprof_dashboard.serve import bind, serve

    serving = bind(runs, host=host, port=port, token=token)
    print(f"The dashboard is at {serving.address}", flush=True)
    say("it serves until you press Ctrl-C")
    serve(serving, is_browser_wanted=not no_browser)
    return 0


def offer_dashboard(runs: Path, *, is_wanted: bool = True) -> None:
    """Say how to see runs in a browser and, where somebody is there to answer, ask whether to.

    Args:
        runs: The directory of the runs.
        is_wanted: Whether to ask; else, and in CI, the command is printed and that is all.
    """
    from attnprof.cli.console import is_terminal

    print(f"\nSee the runs in a browser: attnprof dashboard {shlex.quote(str(runs))}", flush=True)
    is_asked = is_wanted and is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if not is_asked or "CI" in os.environ or find_missing(NEEDED):
        return
    try:
        answer = input("Open it now? [Y/n] ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        return
    if answer in ("", "y", "yes"):
        dashboard(runs, port=0)


def find_missing(modules: Iterable[str]) -> list[str]:
    """Return those of the modules that are not installed."""
    return [name for name in modules if find_spec(name) is None]

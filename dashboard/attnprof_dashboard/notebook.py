"""The dashboard inside a notebook: served by the notebook's own process, shown in a frame."""

import threading
from html import escape
from typing import TYPE_CHECKING

from attnprof_dashboard.serve import Serving, bind
from attnprof_dashboard.view import View

if TYPE_CHECKING:
    from attnprof.run import Run

_FRAMES = ("http://localhost:*", "http://127.0.0.1:*", "https://localhost:*")
"""Notebooks on this machine may show it; on another one, open the link."""


class LiveView:
    """A dashboard that a notebook shows where this object is a cell's result."""

    def __init__(self, serving: Serving, address: str, run: "Run", *, height: int) -> None:
        """Wrap a server that is running.

        Args:
            serving: The server.
            address: What to show first.
            run: The run that is shown.
            height: Of the frame, in pixels.
        """
        self._serving = serving
        self._run = run
        """Kept alive: the directory of a run without a path goes with the run."""
        self.address = address
        """What to open in a browser; it has the token in it."""
        self._height = height

    def __repr__(self) -> str:
        return f"LiveView({self.address!r})"

    def _repr_html_(self) -> str:
        """Return a frame, and a link for where frames are not shown."""
        address = escape(self.address, quote=True)
        return (
            f'<p><a href="{address}" target="_blank" rel="noopener noreferrer">Open the dashboard '
            f'in a page of its own</a></p><iframe src="{address}" width="100%" '
            f'height="{self._height}" style="border:1px solid #8888; border-radius:8px" '
            'title="attnprof dashboard"></iframe>'
        )

    def close(self) -> None:
        """Stop serving."""
        self._serving.close()


def jupyter(run: "Run", *, height: int = 900, port: int = 0) -> LiveView:
    """Serve the dashboard for a run and return what a notebook shows it with.

    The server is a thread of this process and ends with it. It listens on this machine only: with
    a notebook on another machine, forward its port and open the link.

    Args:
        run: The run; it is read from its directory.
        height: Of the frame, in pixels.
        port: The port; 0 for any that is free.

    Raises:
        CommandError: The port is taken, or the run's directory is gone.
    """
    # Cookies of a frame are kept if it has the notebook's own host name.
    serving = bind(run.path, host="127.0.0.1", port=port, frames=_FRAMES)
    threading.Thread(target=serving.run, name="attnprof-dashboard", daemon=True).start()
    query = View(run=run.path.resolve().name).query()
    address = serving.address.replace("127.0.0.1", "localhost") + "&" + query[1:]
    return LiveView(serving, address, run, height=height)

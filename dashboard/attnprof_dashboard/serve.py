"""Serve the dashboard on this machine."""

import errno
import socket
import threading
import webbrowser
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from waitress.server import create_server

from attnprof.errors import CommandError
from attnprof_dashboard.app import create_app
from attnprof_dashboard.data.catalog import Catalog
from attnprof_dashboard.security import LOOPBACK, QUERY, make_token

DEFAULT_PORT = 8050
_THREADS = 8
_LEAST_TOKEN = 16
"""Characters of a token for more than this machine: shorter ones are guessed."""
_ANY = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that is bound and not yet running."""

    address: str
    """What to open in a browser; it has the token in it."""
    _server: Any
    _is_closing: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Serve until `close` is called, or the process is interrupted."""
        try:
            self._server.run()
        except OSError:  # its sockets were closed while it waited for them
            if not self._is_closing.is_set():
                raise

    def close(self) -> None:
        """Stop serving; from any thread."""
        self._is_closing.set()
        self._server.close()


def bind(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    cache: Path | None = None,
    frames: Sequence[str] = (),
) -> Serving:
    """Return a server for the runs below a directory, bound to its port.

    Args:
        root: The directory.
        host: The address to bind; other machines reach all but loopback.
        port: The port; 0 for any that is free.
        token: What browsers must know; without, a new one.
        cache: Where to keep what is derived from runs.
        frames: Origins of pages that may show it in a frame.

    Raises:
        CommandError: There is no such directory, the port is taken, or the host is not this
            machine's own and no token was given.
    """
    if not root.is_dir():
        what = f"{root} is a file" if root.exists() else f"there is no directory {root}"
        raise CommandError(f"{what}; give the directory that holds your runs")
    if host not in LOOPBACK and (token is None or len(token) < _LEAST_TOKEN):
        raise CommandError(
            f"other machines reach {host}, so it needs --token with a secret of {_LEAST_TOKEN} "
            "characters or more; or leave --host out and use an SSH tunnel"
        )
    secret = token or make_token()
    app = create_app(
        Catalog(root), token=secret, hosts=_list_hosts(host), cache=cache, frames=frames
    )
    listening = _listen(host, port)
    # Polled: select() knows no file descriptor above 1023, and a notebook may have more.
    server = create_server(
        app.server, sockets=[listening], threads=_THREADS, ident=None, asyncore_use_poll=True
    )
    shown = "127.0.0.1" if host in _ANY else host
    shown = f"[{shown}]" if ":" in shown else shown
    return Serving(f"http://{shown}:{listening.getsockname()[1]}/?{QUERY}={quote(secret)}", server)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        is_unknown = isinstance(error, socket.gaierror) or (
            isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL
        )
        advice = (
            "give a --host that is an address of this machine, or none for this machine alone"
            if is_unknown
            else "give another --port, or 0 for any that is free"
        )
        raise CommandError(f"cannot listen on {host}:{port}: {reason}; {advice}") from None
    return found


def _list_hosts(host: str) -> Collection[str]:
    """Return the names under which a server that is bound to ``host`` is reached."""
    names = {*LOOPBACK, host}
    if host in _ANY:
        names |= {socket.gethostname(), socket.getfqdn()}
    return names


def serve(serving: Serving, *, is_browser_wanted: bool) -> None:
    """Serve until interrupted."""
    if is_browser_wanted:
        webbrowser.open(serving.address)
    with suppress(KeyboardInterrupt), closing(serving):
        serving.run()

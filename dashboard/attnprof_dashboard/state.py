"""What one running dashboard knows, found through the request that is being answered."""

from dataclasses import dataclass

from flask import Flask, current_app

from attnprof_dashboard.data.catalog import Catalog, Entry, Kind
from attnprof_dashboard.data.live import LiveStore
from attnprof_dashboard.data.store import DigestStore

_NAME = "attnprof"


@dataclass(frozen=True, slots=True)
class State:
    """The catalogue and what was derived from its runs."""

    catalog: Catalog
    store: DigestStore
    live: LiveStore
    prefix: str = "/"
    """The path that all addresses begin with."""

    def pick(self, key: str) -> Entry | None:
        """Return the run of a key; without one, the newest that can be read."""
        if key:
            return self.catalog.find(key)
        entries = [entry for entry in self.catalog.entries() if entry.kind is Kind.RUN]
        readable = [entry for entry in entries if entry.is_readable]
        return next(iter(readable or entries), None)


def attach(server: Flask, state: State) -> None:
    """Make a server's requests find a state."""
    server.extensions[_NAME] = state


def current() -> State:
    """Return the state of the server that is answering."""
    state = current_app.extensions[_NAME]
    assert isinstance(state, State)
    return state

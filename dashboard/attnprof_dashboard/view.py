"""`View`: what a page shows, as its URL says it. Every view is a permalink."""

from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import urlencode

_MOST_DIGITS = 20


@dataclass(frozen=True, slots=True)
class View:
    """The query of a URL, checked: what does not read as it should is left out."""

    run: str = ""
    """A key of the catalogue."""
    device: str = ""
    t0: int | None = None
    """The window's begin, in nanoseconds on the run's clock."""
    t1: int | None = None
    """The window's end."""
    at: int | None = None
    """The event that is looked at."""
    since: int | None = None
    """An earlier event: what came between the two is asked for."""
    block: int | None = None
    """The block that is looked at, by its ``allocation_id``."""
    layer: str = ""
    category: str = ""
    other: str = ""
    """The second run of a comparison."""
    step: int | None = None
    sweep: str = ""
    """The sweep whose growth is shown; a key of the catalogue."""
    capacity: str = ""
    """The device whose memory is the limit."""
    batch_doublings: int | None = None
    """How many times the batch is doubled; negative: halved."""
    head_doublings: int | None = None
    dtype_halvings: int | None = None

    @classmethod
    def read(cls, query: dict[str, Any]) -> "View":
        """Return the view of a query's parameters."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            text = query.get(field.name)
            if text is None or text == "":
                continue
            is_text = field.default == ""
            value = str(text) if is_text else _read_number(text)
            if value is not None:
                found[field.name] = value
        return cls(**found)

    def query(self) -> str:
        """Return the view as a URL's query, ``"?run=…"``; nothing if it says nothing."""
        said = {name: value for name, value in asdict(self).items() if value not in ("", None)}
        return f"?{urlencode(said)}" if said else ""


def _read_number(text: object) -> int | None:
    word = str(text)
    digits = word.removeprefix("-")
    return int(word) if digits.isdecimal() and len(digits) <= _MOST_DIGITS else None

"""The ids of components that callbacks speak of: in one place, so that they cannot drift apart."""

SUBJECT = "subject"
"""Store with the run and device that a page is about."""
GO = "go"
"""Store with an address to go to."""
VIEW = "view"
"""What the page shows: a store with the fields of `View`, and the one truth about it."""
MARKS = "marks"
"""Holds the times that keys jump to."""
RUN = "run"
DEVICE = "device"
SEARCH = "search"
THEME = "theme"
HELP = "help"
HELP_BUTTON = "help-button"
NAVBAR_BUTTON = "navbar-button"
SHELL = "shell"
WAITING = "waiting"
TICK = "tick"
"""The clock of the Live page; it stands still while nobody looks, and is slow after the end."""
LIVE = "live"
LIVE_SAID = "live-said"
BODY = "body"
"""What is drawn anew when the view changes."""

TIMELINE = "timeline"
READOUT = "readout"
DRAWER = "drawer"
DRAWER_BODY = "instant"
BLOCKS = "blocks"
BLOCKS_PAGE = "blocks-page"
BLOCKS_FILTER = "blocks-filter"


CLICKED = "at"
"""Not an id: in the list of instants, the value of the one that was clicked."""


def choose(field: str) -> dict[str, str]:
    """Return the id of a control whose value is a field of the view."""
    return {"type": "choose", "field": field}


def pick(graph: str) -> dict[str, str]:
    """Return the id of a graph over time on which a click chooses the instant."""
    return {"type": "pick", "graph": graph}


def lead(graph: str) -> dict[str, str]:
    """Return the id of a graph on which a click leads to another page."""
    return {"type": "lead", "graph": graph}


def rows(page: str, chart: str) -> dict[str, str]:
    """Return the id of what holds the rows of a chart's table."""
    return {"type": "rows", "page": page, "chart": chart}


def turn(page: str, chart: str) -> dict[str, str]:
    """Return the id of the control that turns the pages of a chart's table."""
    return {"type": "turn", "page": page, "chart": chart}


def unfold(page: str, chart: str) -> dict[str, str]:
    """Return the id of what unfolds a chart's table."""
    return {"type": "unfold", "page": page, "chart": chart}


def nav(path: str) -> dict[str, str]:
    """Return the id of a page's link."""
    return {"type": "nav", "path": path}

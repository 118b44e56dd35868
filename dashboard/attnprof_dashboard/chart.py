"""`Chart`: a figure with its title and its numbers; what pages show and files export."""

from dataclasses import dataclass

import plotly.graph_objects as go

from attnprof_dashboard.table import Table


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a page."""

    key: str
    """Names it within its page: in the address of its files and as the id of its graph."""
    title: str
    why: str
    """What it shows, in a sentence."""
    table: Table
    """The same numbers, for those who cannot see or want to compute."""
    figure: go.Figure | None = None
    """None where a table says it all."""
    gestures: str = ""
    """What can be done to the figure, as long as there is a server."""

"""The blocks of a paged cache over forwards: whose they were, and how full."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
import polars as pl

from attnprof_dashboard.figures.theme import new_figure

STATES = ("free", "taken, empty", "slack", "used", "shared")
"""Of a block, by rising fill: `slack` has tokens and room, `shared` several sequences."""
_MOST_ROWS = 128
_MOST_COLUMNS = 400

Codes = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def find_states(blocks: pl.DataFrame) -> tuple[list[int], Codes]:
    """Return forwards, and per block of the pool and forward a position in `STATES`.

    Args:
        blocks: The rows of one table of `Run.kv_blocks`.
    """
    forwards = blocks["forward"].unique().sort()
    last = blocks.select(pl.max_horizontal(pl.col("block") + 1, "pool_blocks").max()).item()
    codes: Codes = np.zeros((last, len(forwards)), np.int64)
    state = blocks.select(
        pl.when(pl.col("sequences") > 1)
        .then(4)
        .when(pl.col("tokens") >= pl.col("block_tokens"))
        .then(3)
        .when(pl.col("tokens") > 0)
        .then(2)
        .otherwise(1)
    ).to_series()
    at = np.searchsorted(forwards.to_numpy(), blocks["forward"].to_numpy())
    codes[blocks["block"].to_numpy(), at] = state.to_numpy()
    return forwards.to_list(), codes


def draw_raster(
    blocks: pl.DataFrame, *, scheme: str, colours: Mapping[str, str]
) -> tuple[go.Figure, int]:
    """Return blocks by forwards in the colours of their states, and how many blocks share a row.

    Where there are more blocks than rows, a row has the state that most of its blocks are in;
    where there are more forwards than columns, some are left out.

    Args:
        blocks: The rows of one table of `Run.kv_blocks`.
        scheme: ``"light"`` or ``"dark"``.
        colours: Per state.
    """
    forwards, codes = find_states(blocks)
    chosen = np.unique(
        np.linspace(0, len(forwards) - 1, min(len(forwards), _MOST_COLUMNS), dtype=int)
    )
    per_row = -(-len(codes) // _MOST_ROWS)
    shown = _take_most(codes[:, chosen], per_row)
    figure = new_figure(scheme, height=120 + max(160, min(480, 5 * len(shown))))
    steps = np.linspace(0, 1, len(STATES) + 1)
    scale = [
        [float(edge), colours[name]]
        for number, name in enumerate(STATES)
        for edge in (steps[number], steps[number + 1])
    ]
    figure.add_heatmap(
        x=[forwards[at] for at in chosen],
        y=(per_row * np.arange(len(shown))).tolist(),
        z=shown.tolist(),
        text=[[STATES[code] for code in row] for row in shown.tolist()],
        hovertemplate="block %{y}, forward %{x}: <b>%{text}</b><extra></extra>",
        colorscale=scale,
        zmin=-0.5,
        zmax=len(STATES) - 0.5,
        showscale=False,
    )
    for number, name in enumerate(STATES):
        if (shown == number).any():
            figure.add_scatter(
                x=[None],
                y=[None],
                mode="markers",
                name=name,
                marker={"symbol": "square", "size": 11, "color": colours[name]},
            )
    figure.update_xaxes(title_text="forward", showgrid=False, zeroline=False, tickformat=",d")
    figure.update_yaxes(
        title_text="block", showgrid=False, zeroline=False, autorange="reversed", tickformat=",d"
    )
    figure.update_layout(
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 40, "b": 8},
    )
    return figure, per_row


def _take_most(codes: Codes, per_row: int) -> Codes:
    """Return per bundle of rows the code that most of them have; of equals the higher."""
    missing = -len(codes) % per_row
    padded = np.pad(codes, ((0, missing), (0, 0)), constant_values=-1)
    bundles = padded.reshape(-1, per_row, codes.shape[1])
    counts = np.stack([(bundles == number).sum(axis=1) for number in range(len(STATES))])
    result: Codes = len(STATES) - 1 - counts[::-1].argmax(axis=0)
    return result

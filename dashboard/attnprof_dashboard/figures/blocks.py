"""The blocks of a paged cache over forwards: whose they were, and how full."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import polars as pl

from attnprof_dashboard.figures.theme import FREE_EDGE, new_figure

STATES = ("free", "kept", "taken, empty", "slack", "used", "shared")
"""Of a block, by rising fill: `kept` is no sequence's and yet not free, `slack` has tokens and
room, `shared` several sequences."""
_FREE, _KEPT, _EMPTY, _SLACK, _USED, _SHARED = range(len(STATES))
_MOST_ROWS = 128
_MOST_COLUMNS = 400

Codes = np.ndarray[tuple[int, int], np.dtype[np.int64]]


def find_states(blocks: pl.DataFrame) -> tuple[list[int], list[int], Codes]:
    """Return blocks, forwards, and per block of the pool and forward a position in `STATES`.

    Engines reserve the first numbers for blocks that nobody is given, so that numbers may be larger
    than the pool; of these, as many of the last ones are taken as the pool has.

    How many blocks are kept is known, and which is not: they are taken to be blocks that sequences
    left full, the latest first, since only a full one serves another prompt.

    Args:
        blocks: The rows of one table of `Run.kv_blocks`.
    """
    forwards = blocks["forward"].unique().sort()
    sums = sum_blocks(blocks)
    numbers, size = blocks["block"].to_numpy(), int(blocks["pool_blocks"][0])
    first = int(min(numbers.min(), max(0, numbers.max() + 1 - size)))
    rows = max(size, int(numbers.max()) + 1 - first)
    codes: Codes = np.full((rows, len(forwards)), _FREE, np.int64)
    state = blocks.select(
        pl.when(pl.col("sequences") > 1)
        .then(_SHARED)
        .when(pl.col("tokens") >= pl.col("block_tokens"))
        .then(_USED)
        .when(pl.col("tokens") > 0)
        .then(_SLACK)
        .otherwise(_EMPTY)
    ).to_series()
    at = np.searchsorted(forwards.to_numpy(), blocks["forward"].to_numpy())
    codes[numbers - first, at] = state.to_numpy()
    _place_kept(codes, sums["kept"].to_list())
    return list(range(first, first + rows)), forwards.to_list(), codes


def _place_kept(codes: Codes, counts: Sequence[int]) -> None:
    """Mark in each column so many of the free blocks as kept."""
    left = np.full(len(codes), -1)  # when a sequence had it last; later than all others if full
    for at, count in enumerate(counts):
        column = codes[:, at]
        is_taken = column != _FREE
        left[is_taken] = at + len(counts) * (column[is_taken] >= _USED)
        if count > 0:
            others = np.flatnonzero(~is_taken)
            column[others[np.argsort(-left[others], kind="stable")[:count]]] = _KEPT


def sum_blocks(blocks: pl.DataFrame) -> pl.DataFrame:
    """Return per forward how many blocks of a pool are in which state; together they are the pool.

    Columns: ``forward``, ``tokens``, those of `STATES`, ``taken`` by sequences, of these ``filled``
    with a token or more, ``pool``, and ``room`` in tokens. Of a block with tokens and room, the
    part with tokens is ``used`` and the rest ``slack``.

    Args:
        blocks: The rows of one table of `Run.kv_blocks`.
    """
    fill = (pl.col("tokens") / pl.col("block_tokens")).clip(0, 1)
    is_one = pl.col("sequences") <= 1
    has_tokens = pl.col("tokens") > 0
    sums = blocks.group_by("forward").agg(
        pl.col("tokens").sum(),
        (~is_one).sum().cast(pl.Int64).alias("shared"),
        fill.filter(is_one).sum().alias("used"),
        (1 - fill).filter(is_one & has_tokens).sum().alias("slack"),
        (is_one & ~has_tokens).sum().cast(pl.Int64).alias("taken, empty"),
        pl.len().cast(pl.Int64).alias("taken"),
        has_tokens.sum().cast(pl.Int64).alias("filled"),
        pl.col("free_blocks").first().alias("free"),
        pl.col("pool_blocks").first().alias("pool"),
        room=(pl.col("block_tokens") - pl.col("tokens")).filter(has_tokens).sum(),
    )
    kept = (pl.col("pool") - pl.col("taken") - pl.col("free")).alias("kept")
    return sums.with_columns(kept).sort("forward")


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
    numbers, forwards, codes = find_states(blocks)
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
        y=numbers[::per_row],
        z=shown.tolist(),
        text=[[STATES[code] for code in row] for row in shown.tolist()],
        hovertemplate="block %{y}, forward %{x}: <b>%{text}</b><extra></extra>",
        colorscale=scale,
        zmin=-0.5,
        zmax=len(STATES) - 0.5,
        showscale=False,
    )
    _list_states(figure, np.unique(shown).tolist(), colours)
    frame = {"showline": True, "mirror": True, "linecolor": FREE_EDGE}
    figure.update_xaxes(
        title_text="forward", showgrid=False, zeroline=False, tickformat=",d", **frame
    )
    figure.update_yaxes(
        **frame,
        title_text="block",
        showgrid=False,
        zeroline=False,
        autorange="reversed",
        tickformat=",d",
    )
    figure.update_layout(
        hovermode="closest",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 8, "r": 8, "t": 40, "b": 8},
    )
    return figure, per_row


def _list_states(figure: go.Figure, codes: Sequence[int], colours: Mapping[str, str]) -> None:
    """Name in the legend the states that occur."""
    for code in codes:
        edge = {"color": FREE_EDGE, "width": 1 if code == _FREE else 0}
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            name=STATES[code],
            marker={"symbol": "square", "size": 11, "color": colours[STATES[code]], "line": edge},
        )


def _take_most(codes: Codes, per_row: int) -> Codes:
    """Return per bundle of rows the code that most of them have; of equals the higher."""
    missing = -len(codes) % per_row
    padded = np.pad(codes, ((0, missing), (0, 0)), constant_values=-1)
    bundles = padded.reshape(-1, per_row, codes.shape[1])
    counts = np.stack([(bundles == number).sum(axis=1) for number in range(len(STATES))])
    result: Codes = len(STATES) - 1 - counts[::-1].argmax(axis=0)
    return result

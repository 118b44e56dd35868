"""Controls whose value is a field of the view: what is chosen is in the URL."""

from collections.abc import Iterable, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash.development.base_component import Component

from attnprof_dashboard import ids
from attnprof_dashboard.data.catalog import Entry, Kind

CLEAR = {"aria-label": "clear", "aria-hidden": False, "tabIndex": 0}
"""Properties of a list's ×: of its own it has no name, and keys cannot reach it."""


def choose(
    field: str,
    items: Sequence[Any],
    value: object,
    placeholder: str,
    label: str,
    *,
    is_clearable: bool = True,
    width: int = 300,
) -> Component:
    """Return a list to choose from.

    Args:
        field: The field of the view.
        items: The choices, as Mantine's Select takes them.
        value: What is chosen; None or nothing for none.
        placeholder: What stands there without a choice.
        label: What is chosen.
        is_clearable: Whether none is a choice.
        width: At most, in pixels.
    """
    return dmc.Select(
        id=ids.choose(field),
        data=list(items),
        value=None if value in (None, "") else str(value),
        placeholder=placeholder,
        label=label,
        clearable=is_clearable,
        clearButtonProps=CLEAR,
        allowDeselect=is_clearable,
        searchable=True,
        openOnFocus=False,  # it gets the focus back when the page is drawn anew
        size="sm",
        limit=200,
        className="control",
        style={"maxWidth": width},
    )


def list_runs(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return the choices of runs: sweeps' runs in groups of their own, all with their status.

    They have their whole keys: the one that is chosen stands there without its group.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in entries:
        if entry.kind is not Kind.RUN:
            continue
        status = "" if entry.status == "completed" else f"  ({entry.status.replace('_', ' ')})"
        group = f"sweep {entry.sweep}" if entry.sweep else "runs"
        groups.setdefault(group, []).append({"value": entry.key, "label": f"{entry.key}{status}"})
    return [{"group": group, "items": items} for group, items in groups.items()]

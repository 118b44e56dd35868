"""A page as one HTML file: what is on the screen, with whole tables, and no server to ask."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.io
from dash.development.base_component import Component
from plotly.offline import get_plotlyjs

from attnprof_dashboard.components.tables import label_category, show_value
from attnprof_dashboard.figures.theme import CONFIG, TEMPLATES
from attnprof_dashboard.table import Column, Table, Unit

MOST_ROWS = 2000
"""Of a table; the CSV has all."""
_HTML = "dash_html_components"
_VOID = ("br", "wbr")
_LEFT_OUT = frozenset({"controls", "sliders", "hints", "card-tools", "pin", "gestures"})
"""Classes of what only a server makes work."""
_ATTRIBUTES = {
    "className": "class", "title": "title", "role": "role", "aria-label": "aria-label"
}  # fmt: skip
_STYLE = "body > main { padding: 24px 16px; } .table-beside[open] > div { max-height: none; }"


def write_page(title: str, content: Any, tables: Mapping[str, Table]) -> str:
    """Return a file that shows what a page shows.

    Args:
        title: What stands above it.
        content: The page's components.
        tables: By key of the chart, its whole table.
    """
    name = escape(title)
    assets = Path(__file__).parent / "assets"
    style = (assets / "app.css").read_text("utf-8") + _STYLE
    script = get_plotlyjs().replace("</script", "<\\/script")
    script += (assets / "print.js").read_text("utf-8")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style><script>{script}</script></head><body>"
        f'<main class="page"><h1>{name}</h1>{_write(content, tables)}</main></body></html>'
    )


def _write(part: Any, tables: Mapping[str, Table]) -> str:
    if part is None:
        return ""
    if isinstance(part, list | tuple):
        return "".join(_write(each, tables) for each in part)
    if not isinstance(part, Component):
        return escape(str(part))
    kind, values = part._type, part.to_plotly_json()["props"]
    if kind == "Graph":
        light = values["figure"].update_layout(template=TEMPLATES["light"])
        return str(plotly.io.to_html(light, full_html=False, include_plotlyjs=False, config=CONFIG))
    if values.get("hidden") or not _LEFT_OUT.isdisjoint((values.get("className") or "").split()):
        return ""
    identity = values.get("id")
    if isinstance(identity, dict) and identity.get("type") == "rows":
        return f"<div>{write_table(tables[identity['chart']])}</div>"
    inner = _write(values.get("children"), tables)
    if part._namespace != _HTML:
        # Of what Mantine and Dash draw, the text; controls have none.
        return inner
    tag = "span" if kind in ("Button", "A") else kind.lower()
    head = f"<{tag}{_write_attributes(values)}>"
    return head if tag in _VOID else f"{head}{inner}</{tag}>"


def _write_attributes(values: Mapping[str, Any]) -> str:
    said = {name: values[key] for key, name in _ATTRIBUTES.items() if values.get(key)}
    if values.get("style"):
        said["style"] = ";".join(f"{_name_style(k)}:{v}" for k, v in values["style"].items())
    return "".join(f' {name}="{escape(str(text))}"' for name, text in said.items())


def _name_style(key: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in key)


def write_table(table: Table) -> str:
    """Return the rows of a table, as people read them."""
    head = "".join(_cell("th", escape(c.title), c) for c in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(_cell("td", _show(c, v), c) for c, v in zip(table.columns, row, strict=True))
        + "</tr>"
        for row in table.rows[:MOST_ROWS]
    )
    more = len(table.rows) - MOST_ROWS
    note = f'<p class="why">{more:,} more rows are in the CSV.</p>' if more > 0 else ""
    note = note or ("" if table.rows else '<p class="why">None.</p>')
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _show(column: Column, value: Any) -> str:
    if column.unit is Unit.CATEGORY and value:
        return _write(label_category(str(value)), {})
    return escape(show_value(column.unit, value))


def _cell(tag: str, text: str, column: Column) -> str:
    kind = ' class="num"' if column.is_number else ""
    return f"<{tag}{kind}>{text}</{tag}>"

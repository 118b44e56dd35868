"""The pieces that pages are put together from."""

import json
from collections.abc import Iterable, Sequence
from html import escape

from attnprof.palette import colour_of

Cell = tuple[str, str]
"""Class and content of a table's cell; the content is HTML."""


def embed(values: object) -> str:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(values, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def make_section(title: str, why: str, body: str) -> str:
    """Return a card: its title, a line on what it shows, and its body, all HTML."""
    return f'<section>\n<h2>{title}</h2>\n<p class="why">{why}</p>\n{body}\n</section>'


def make_table(head: Sequence[Cell], rows: Iterable[str]) -> str:
    """Return a table that scrolls sideways by itself where the page is narrow."""
    cells = "".join(f'<th class="{kind}">{title}</th>' for kind, title in head)
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def make_row(cells: Sequence[Cell], kind: str = "") -> str:
    """Return a row of a table."""
    inside = "".join(f'<td class="{style}">{content}</td>' for style, content in cells)
    return f'<tr class="{kind}">{inside}</tr>' if kind else f"<tr>{inside}</tr>"


def make_swatch(category: str) -> str:
    """Return a square in the category's colour."""
    return f'<i class="swatch" style="background:{colour_of(category)}"></i>'


def label_category(category: str) -> str:
    """Return a category's name beside its colour."""
    return f"{make_swatch(category)}{escape(category)}"


def percent(part: float) -> str:
    """Return a fraction as a CSS length."""
    return f"{100 * part:.3f}%"

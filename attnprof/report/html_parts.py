"""The pieces that pages are put together from."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from attnprof.palette import colour_of
from attnprof.report.notes import Note
from attnprof.report.words import OUTSIDE

Cell = tuple[str, str]
"""Class and content of a table's cell; the content is HTML."""


def fill_page(
    *,
    name: str,
    status: str,
    is_good: bool,
    meta: str,
    verdict: str,
    sections: Iterable[str],
    footer: str,
    data: object,
    styles: Sequence[str],
    script: str,
) -> str:
    """Return a whole page.

    Args:
        name: Its title; text, as all that follows but the sections.
        status: A word on what it is about.
        is_good: Whether that is as it should be.
        meta: Where and when it was recorded.
        verdict: The one sentence.
        sections: HTML.
        footer: The last line.
        data: What the script needs, as values that JSON knows.
        styles: Files of this package with style sheets.
        script: A file of this package with the script.
    """
    return Template(_read("page.html")).substitute(
        title=escape(f"{name} · attnprof"),
        name=escape(name),
        status=escape(status),
        status_class="good" if is_good else "bad",
        meta=escape(meta),
        verdict=escape(verdict),
        sections="\n".join(sections),
        footer=escape(footer),
        data=embed(data),
        style="\n".join(_read(style) for style in styles),
        script=_read(script),
    )


def _read(name: str) -> str:
    return files("attnprof.report").joinpath(name).read_text(encoding="utf-8")


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


def make_tiles(tiles: Iterable[tuple[str, str, str]]) -> str:
    """Return a row of figures: of each the class of its large text, that text and a small one.

    ``"small"`` is the class of a layer's name.
    """
    cells = "".join(
        f'<div class="tile"><b class="{kind}">'
        f"{show_layer(large, 1) if kind == 'small' else escape(large)}</b>"
        f"<span>{escape(small)}</span></div>"
        for kind, large, small in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def make_notes(notes: Iterable[Note]) -> str:
    """Return the section with the remarks on a report's quality."""
    entries = "".join(
        f'<dt class="{"warn" if note.is_warning else ""}">{escape(note.subject)}</dt>'
        f"<dd>{escape(note.text)}</dd>"
        for note in notes
    )
    return f"<section><h2>How far to trust this</h2><dl>{entries}</dl></section>"


def show_layer(layer: str, count: int) -> str:
    """Return a folded layer's name with how many layers it stands for."""
    times = f' <span class="times">×{count}</span>' if count > 1 else ""
    # A long path breaks at its dots first.
    return escape(layer or OUTSIDE).replace(".", ".<wbr>") + times


def make_swatch(category: str) -> str:
    """Return a square in the category's colour."""
    return f'<i class="swatch" style="background:{colour_of(category)}"></i>'


def label_category(category: str) -> str:
    """Return a category's name beside its colour."""
    return f"{make_swatch(category)}{escape(category)}"


def percent(part: float) -> str:
    """Return a fraction as a CSS length."""
    return f"{100 * part:.3f}%"

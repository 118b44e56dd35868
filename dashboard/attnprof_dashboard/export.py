"""Files about what is shown: CSV of any chart, and a page as one HTML file without network."""

import json
import re
from html import escape
from typing import Any

import plotly.io
from flask import Blueprint, Flask, Response, abort, request
from plotly.offline import get_plotlyjs

from attnprof_dashboard.chart import Chart
from attnprof_dashboard.comparison import compare, describe_comparison
from attnprof_dashboard.components.tables import show_value
from attnprof_dashboard.figures.theme import CONFIG, TEMPLATES
from attnprof_dashboard.pages import find_page
from attnprof_dashboard.pages.compare import find_other, open_other
from attnprof_dashboard.pages.page import Missing, Page, Subject, open_for
from attnprof_dashboard.table import Table, write_csv
from attnprof_dashboard.view import View

_STYLE = """
body{margin:0 auto;padding:24px;max-width:1280px;background:#f6f6f4;color:#16181d;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
font-variant-numeric:tabular-nums}
section{background:#fff;border:1px solid #e2e3e7;border-radius:10px;padding:16px 18px;margin:14px 0;
overflow-x:auto}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:0}p{margin:2px 0 12px;color:#5b626e}
table{border-collapse:collapse;font-size:13px}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid #e2e3e7}
.num{text-align:right;white-space:nowrap}
"""
_MOST_ROWS = 2000


def register(server: Flask, prefix: str) -> None:
    """Add the addresses of files to a server."""
    files = Blueprint("export", __name__, url_prefix=f"{prefix}export")

    @files.get("/<page>/<key>.csv")
    def save_chart(page: str, key: str) -> Response:
        found, subject = _find(page)
        chart = next((c for c in found.charts(subject) if c.key == key), None)
        if chart is None:
            abort(404, f"the page {page!r} has no chart {key!r}")
        name = _name_file(subject, f"{page}-{key}.csv")
        return _send(write_csv(chart.table), "text/csv", name)

    @files.get("/<page>.html")
    def save_page(page: str) -> Response:
        found, subject = _find(page)
        text = write_page(found.title, subject, found.charts(subject))
        return _send(text, "text/html", _name_file(subject, f"{page}.html"))

    @files.get("/compare.json")
    def save_comparison() -> Response:
        _, subject = _find("compare")
        other, why_not = open_other(subject, find_other(subject))
        if other is None:
            abort(404, why_not)
        values = describe_comparison(compare(subject.device, other))
        text = json.dumps(values, indent=2)
        return _send(text, "application/json", _name_file(subject, "compare.json"))

    server.register_blueprint(files)


def _find(name: str) -> tuple[Page, Subject]:
    page = find_page(name)
    if page is None:
        abort(404, f"there is no page {name!r}")
    subject = open_for(page, View.read(request.args.to_dict()), is_fresh=False)
    if isinstance(subject, Missing):
        abort(404, subject.error or "the run is still being read; try again")
    return page, subject


def _send(text: str, kind: str, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text, mimetype=kind, headers=headers)


def _name_file(subject: Subject, what: str) -> str:
    return re.sub(r"[^\w.-]+", "-", f"attnprof-{subject.entry.key}-{what}")


def write_page(title: str, subject: Subject, charts: list[Chart]) -> str:
    """Return a page that shows charts and their tables without asking any server."""
    parts = [_write_chart(chart) for chart in charts]
    name = escape(f"{title}: {subject.entry.key}")
    script = get_plotlyjs().replace("</script", "<\\/script")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style><script>{script}</script></head><body><h1>{name}</h1>"
        f"{''.join(parts)}</body></html>"
    )


def _write_chart(chart: Chart) -> str:
    figure = ""
    if chart.figure is not None:
        light = chart.figure.update_layout(template=TEMPLATES["light"])
        figure = plotly.io.to_html(light, full_html=False, include_plotlyjs=False, config=CONFIG)
    table = _write_table(chart.table)
    if figure:
        table = f"<details><summary>Table</summary>{table}</details>"
    head = f"<h2>{escape(chart.title)}</h2><p>{escape(chart.why)}</p>"
    return f"<section>{head}{figure}{table}</section>"


def _write_table(table: Table) -> str:
    head = "".join(_cell("th", c.title, is_number=c.is_number) for c in table.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            _cell("td", show_value(c.unit, v), is_number=c.is_number)
            for c, v in zip(table.columns, row, strict=True)
        )
        + "</tr>"
        for row in table.rows[:_MOST_ROWS]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(tag: str, text: Any, *, is_number: bool) -> str:
    kind = ' class="num"' if is_number else ""
    return f"<{tag}{kind}>{escape(str(text))}</{tag}>"

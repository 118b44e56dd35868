"""Files about what is shown: CSV of any chart, and a page as one HTML file without network."""

import json
import re

from flask import Blueprint, Flask, Response, abort, request

from attnprof_dashboard.comparison import compare, describe_comparison
from attnprof_dashboard.pages import find_page
from attnprof_dashboard.pages.compare import find_other, open_other
from attnprof_dashboard.pages.page import Missing, Page, Subject, list_warnings, open_for
from attnprof_dashboard.saved_page import write_page
from attnprof_dashboard.table import write_csv
from attnprof_dashboard.view import View


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
        tables = {chart.key: chart.table for chart in found.charts(subject)}
        shown = [found.layout(subject), *found.saved(subject)]
        content = [*list_warnings(found, subject), *shown]
        text = write_page(f"{found.title}: {subject.entry.key}", content, tables)
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

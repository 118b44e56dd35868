"""The Dash app: pages, security and files put together."""

import json
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dash
from dash import Dash
from dash.exceptions import DependencyException, InvalidResourceError
from flask import Flask, Response, request

from attnprof_dashboard import export, state
from attnprof_dashboard.components import shell
from attnprof_dashboard.data.catalog import Catalog
from attnprof_dashboard.data.live import LiveStore
from attnprof_dashboard.data.store import DigestStore
from attnprof_dashboard.figures.theme import TEMPLATES
from attnprof_dashboard.pages import PAGES
from attnprof_dashboard.pages.page import render, render_unknown
from attnprof_dashboard.security import LOOPBACK, protect

_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
{{%metas%}}
<title>{{%title%}}</title>
<link rel="icon" type="image/svg+xml" href="{prefix}assets/favicon.svg">
<script src="{prefix}assets/scheme.js"></script>
<link rel="preload" as="script" href="{prefix}{suites}dash/dcc/async-graph.js">
<link rel="preload" as="script" href="{prefix}{suites}plotly/package_data/plotly.min.js">
{{%css%}}
</head>
<body>
{{%app_entry%}}
<script type="application/json" id="attnprof-templates">{templates}</script>
<footer>{{%config%}}{{%scripts%}}{{%renderer%}}</footer>
</body>
</html>"""

_SUITES = "_dash-component-suites/"
"""Where Dash serves the files of components."""
_KEEP_SECONDS = 600
"""A browser asks again for those whose address does not tell their version after so long."""


def create_app(
    catalog: Catalog,
    *,
    token: str,
    hosts: Collection[str] = LOOPBACK,
    prefix: str = "/",
    cache: Path | None = None,
    frames: Sequence[str] = (),
) -> Dash:
    """Return the dashboard on a catalogue's runs; its ``server`` is a WSGI application.

    Args:
        catalog: The runs.
        token: What a browser must know; see `attnprof_dashboard.security`.
        hosts: Host names under which it is reached.
        prefix: The path under which it is reached; begins and ends with a slash.
        cache: Where to keep what is derived from runs; without, in the user's cache directory.
        frames: Origins of pages that may show it in a frame.
    """
    templates = json.dumps(TEMPLATES, separators=(",", ":")).replace("<", "\\u003c")
    server = Flask("attnprof_dashboard")
    protect(
        server,
        token=token,
        hosts=hosts,
        # Dash adds a script of its own when the first page is asked for.
        script_hashes=lambda: app.csp_hashes(),
        prefix=prefix,
        frames=frames,
    )
    app = Dash(
        __package__,
        server=server,
        use_pages=True,
        pages_folder="",
        assets_ignore=r"^scheme\.js$",
        requests_pathname_prefix=prefix,
        routes_pathname_prefix=prefix,
        title="attnprof",
        update_title="",
        include_pages_meta=False,
        index_string=_INDEX.format(prefix=prefix, suites=_SUITES, templates=templates),
        suppress_callback_exceptions=True,
        enable_mcp=False,
        compress=True,
    )
    state.attach(server, state.State(catalog, DigestStore(catalog, cache), LiveStore(), prefix))
    for page in PAGES:
        title, layout = f"{page.title} · attnprof", _lay_out(page)
        dash.register_page(page.name, path=page.path, title=title, layout=layout)
        if page.path == "/":  # those who type addresses find it under its name too
            dash.register_page(f"{page.name}-named", f"/{page.name}", title=title, layout=layout)
        page.register(app)
    # Dash looks for a page of this name where an address has none.
    dash.register_page("not_found_404", title="No such page · attnprof", layout=render_unknown)
    shell.register(app, PAGES)
    app.layout = partial(shell.make_shell, PAGES)
    export.register(server, prefix)
    _serve_components(server)
    return app


def _lay_out(page: Any) -> Any:
    def layout(**query: Any) -> Any:
        return render(page, query)

    return layout


def _serve_components(server: Flask) -> None:
    """Let browsers keep the files of components, and say so where there is none."""

    @server.errorhandler(InvalidResourceError)
    @server.errorhandler(DependencyException)
    def not_found(_: Exception) -> tuple[str, int]:
        return "not found", 404

    @server.after_request
    def keep(response: Response) -> Response:
        if _SUITES in request.path and not response.cache_control.max_age:
            response.cache_control.max_age = _KEEP_SECONDS
        return response

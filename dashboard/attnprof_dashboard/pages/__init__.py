"""The pages. One that is not in `PAGES` does not exist: no link leads to it."""

from attnprof_dashboard.pages import (
    compare,
    fragmentation,
    growth,
    kv_cache,
    layers,
    live,
    overview,
    quality,
    ranks,
    timeline,
)
from attnprof_dashboard.pages.page import Page

PAGES: tuple[Page, ...] = (
    overview.PAGE,
    timeline.PAGE,
    layers.PAGE,
    growth.PAGE,
    kv_cache.PAGE,
    fragmentation.PAGE,
    compare.PAGE,
    ranks.PAGE,
    live.PAGE,
    quality.PAGE,
)
"""In the order of the navigation."""


def find_page(name: str) -> Page | None:
    """Return the page of a name in addresses, or None if there is none."""
    return next((page for page in PAGES if page.name == name), None)

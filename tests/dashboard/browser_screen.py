"""A page of the browser, as tests use it."""

import contextlib
import re
import shutil
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium; 'make test' installs Debian's"
)
PLOT = ".js-plotly-plot"
READY_MS = 30_000
"""A page is drawn within a second; other tests may be using the machine."""


@dataclass
class Screen:
    """A page of the browser, and what it asked for and complained of."""

    page: sync_api.Page
    base: str
    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("request", self._note_request)
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note_request(self, request: sync_api.Request) -> None:
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.foreign.append(request.url)

    def _note_console(self, message: sync_api.ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, path: str) -> None:
        self.page.goto(f"{self.base}{path}")
        self.page.wait_for_selector(".page-head", timeout=READY_MS)

    def open_timeline(self, run: str = "train/eager", more: str = "") -> None:
        self.open(f"timeline?run={run}{more}")
        self.page.wait_for_selector(f"#timeline {PLOT} .nsewdrag", timeout=READY_MS)

    def query(self) -> dict[str, str]:
        return {name: text[0] for name, text in parse_qs(urlsplit(self.page.url).query).items()}

    def wait_for_query(self, *names: str, absent: tuple[str, ...] = ()) -> dict[str, str]:
        self.page.wait_for_function(
            "([there, gone]) => { const q = new URLSearchParams(location.search);"
            " return there.every((n) => q.has(n)) && gone.every((n) => !q.has(n)); }",
            arg=[list(names), list(absent)],
            timeout=READY_MS,
        )
        return self.query()

    def wait_for_readout(self, text: str) -> None:
        self.page.wait_for_function(
            "(text) => document.getElementById('readout').innerText.includes(text)",
            arg=text,
            timeout=READY_MS,
        )

    def traces(self) -> dict[str, list[float]]:
        """Return what the timeline draws, by name."""
        found = self.page.evaluate(
            "() => Object.fromEntries(document.querySelector('#timeline .js-plotly-plot')"
            ".calcdata.map((c) => [c[0].trace.name, c.map((p) => p.s ?? p.y)]))"
        )
        assert isinstance(found, dict)
        return found

    def drag(self, first: float, second: float) -> None:
        """Zoom by dragging between two fractions of the plot's width."""
        box = self.page.locator(f"#timeline {PLOT} .nsewdrag").bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + first * box["width"], y)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + second * box["width"], y, steps=4)
        self.page.mouse.up()

    def wait_for_mark(self, text: str) -> None:
        """Wait until the timeline is drawn with this word on it."""
        mark = self.page.locator("#timeline .annotation-text", has_text=re.compile(f"^{text}$"))
        mark.wait_for(timeout=READY_MS)

    def click_plot(
        self, at: float, changes: str, down: float = 0.6, card: str = "#timeline"
    ) -> None:
        """Click where two fractions of a plot's width and height are, until that has an effect.

        Plotly takes a click for one on the point under the mouse, and loses it while it draws. So
        does a person who clicks too early, and clicks again.

        Args:
            at: The fraction of the width.
            changes: What of the address changes, by its name in the query.
            down: The fraction of the height.
            card: What the plot is in.
        """
        before = self.query().get(changes)
        box = self.page.locator(f"{card} {PLOT} .nsewdrag").first.bounding_box()
        assert box is not None
        x, y = box["x"] + at * box["width"], box["y"] + down * box["height"]
        for attempt in range(READY_MS // 3_000):
            self.page.mouse.move(x, y - attempt % 2)
            self.page.wait_for_timeout(100)  # Plotly throttles what it takes for hovering
            self.page.mouse.click(x, y - attempt % 2)
            with contextlib.suppress(sync_api.TimeoutError):
                self.page.wait_for_function(
                    "([name, before]) => {"
                    " const now = new URLSearchParams(location.search).get(name);"
                    " return now !== null && now !== before; }",
                    arg=[changes, before],
                    timeout=3_000,
                )
                return
        pytest.fail(f"clicking changed no '{changes}' of {self.page.url}")

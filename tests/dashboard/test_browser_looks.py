"""What is seen: on paper, with the keyboard, in narrow cards and on a phone."""

from pathlib import Path

from browser_screen import PLOT, READY_MS, Screen, needs_browser

from attnprof_dashboard.saved_page import write_page

pytestmark = needs_browser
LIGHT, DARK = "rgb(22, 24, 29)", "rgb(231, 233, 237)"
"""Ink."""

_WIDTHS = f"() => [...document.querySelectorAll('{PLOT}')].map((g) => g._fullLayout.width)"
_FILLED = f"""() => [...document.querySelectorAll('{PLOT}')].every(
    (g) => g.parentElement.clientWidth > 680
        && Math.abs(g._fullLayout.width - g.parentElement.clientWidth) < 2)"""
"""Whether figures are as wide as their cards, on a screen."""
_INK = f"() => document.querySelector('{PLOT}')._fullLayout.font.color"
_STYLE = "([selector, name]) => getComputedStyle(document.querySelector(selector))[name]"


def style(screen: Screen, selector: str, name: str) -> str:
    found = screen.page.evaluate(_STYLE, [selector, name])
    assert isinstance(found, str)
    return found


def open_overview(screen: Screen) -> None:
    screen.open("?run=train/eager")
    screen.page.wait_for_selector(f"{PLOT} .nsewdrag", timeout=READY_MS)


def test_paper_has_dark_ink_colours_and_whole_figures(screen: Screen) -> None:
    open_overview(screen)
    screen.page.keyboard.press("d")
    screen.page.wait_for_function(f"() => ({_INK})() === '#e7e9ed'", timeout=READY_MS)
    screen.page.wait_for_selector(":root[data-mantine-color-scheme=dark]", timeout=READY_MS)
    screen.page.wait_for_function(_FILLED, timeout=READY_MS)
    screen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    screen.page.emulate_media(media="print")
    screen.page.wait_for_function(f"() => Math.max(...({_WIDTHS})()) <= 680", timeout=READY_MS)
    screen.page.wait_for_function(f"() => ({_INK})() === '#16181d'", timeout=READY_MS)
    assert style(screen, "body", "color") == LIGHT
    assert style(screen, ".swatch", "printColorAdjust") == "exact"
    assert style(screen, ".shell-header", "display") == "none"
    screen.page.emulate_media(media="screen")
    screen.page.evaluate("dispatchEvent(new Event('afterprint'))")
    screen.page.wait_for_function(_FILLED, timeout=READY_MS)
    screen.page.wait_for_function(f"() => ({_INK})() === '#e7e9ed'", timeout=READY_MS)
    assert style(screen, "body", "color") == DARK


def test_saved_page_fits_paper(screen: Screen, tmp_path: Path) -> None:
    from dash import dcc
    from plotly import graph_objects

    file = tmp_path / "page.html"
    graph = dcc.Graph(figure=graph_objects.Figure(layout={"height": 200}))
    file.write_text(write_page("a page", graph, {}), encoding="utf-8")
    page = screen.page.context.browser.new_page()  # type: ignore[union-attr]  # it has one
    page.goto(file.as_uri())
    page.wait_for_selector(PLOT, timeout=READY_MS)
    assert page.evaluate(_WIDTHS)[0] > 800
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(_WIDTHS)[0] <= 680
    page.close()


def test_list_that_has_the_focus_shows_it(screen: Screen) -> None:
    open_overview(screen)
    outline = style(screen, "#search", "outlineStyle")
    screen.page.locator("#search").focus()
    assert (outline, style(screen, "#search", "outlineStyle")) == ("none", "solid")
    hint = "() => getComputedStyle(document.querySelector('#search'), '::placeholder').color"
    assert screen.page.evaluate(hint) == style(screen, ".why", "color")


def test_tables_fit_their_cards_on_a_wide_screen(screen: Screen) -> None:
    screen.page.set_viewport_size({"width": 1440, "height": 900})
    open_overview(screen)
    wide = (
        "() => [...document.querySelectorAll('.scroll')].filter((e) => e.offsetParent"
        " && e.scrollWidth > e.clientWidth).map((e) => e.innerText)"
    )
    assert screen.page.evaluate(wide) == []


def test_device_is_readable_on_a_phone(screen: Screen) -> None:
    screen.page.set_viewport_size({"width": 390, "height": 844})
    open_overview(screen)
    room = screen.page.evaluate(
        "() => { document.querySelector('.pick-device').classList.remove('only');"
        " const input = document.getElementById('device'); input.value = 'cuda:0';"
        " return [input.scrollWidth - input.clientWidth,"
        " document.getElementById('run').clientWidth]; }"
    )
    assert room[0] == 0
    assert room[1] > 120

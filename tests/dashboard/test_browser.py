"""The dashboard in a browser: what is on the screen, what gestures and keys do, what is asked of
whom."""

import re
from pathlib import Path

import pytest
from browser_screen import PLOT, READY_MS, Screen, needs_browser, sync_api
from known_token import TOKEN

import attnprof
from attnprof.growth import Growth
from attnprof.units import format_bytes
from attnprof_dashboard.pages import PAGES
from attnprof_dashboard.pages.page import Page
from attnprof_dashboard.serve import Serving

pytestmark = needs_browser


@pytest.mark.parametrize(("scheme", "run"), [("light", "train/eager"), ("dark", "decode")])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_drawn_without_a_complaint(
    serving: Serving, browser: sync_api.Browser, page: Page, scheme: str, run: str
) -> None:
    """No console error under the strict policy, and no request to anybody else."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    screen = Screen(context.new_page(), serving.address.partition("?")[0])
    screen.watch()
    screen.page.goto(serving.address)
    screen.open(f"{page.path.lstrip('/')}?run={run}")
    screen.page.wait_for_load_state("networkidle")
    # Nothing is wider than the screen: what does not fit scrolls by itself.
    assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert screen.page.evaluate("document.documentElement.dataset.mantineColorScheme") == scheme
    context.close()
    assert screen.foreign == []
    assert screen.errors == []


def test_address_loses_the_token(screen: Screen) -> None:
    assert TOKEN not in screen.page.url


def test_overview_shows_the_peak_of_the_api(screen: Screen, runs: Path) -> None:
    peak = attnprof.load(runs / "train" / "eager").peak()
    screen.open("?run=train/eager")
    assert format_bytes(peak.total_bytes) in screen.page.locator(".verdict").inner_text()
    assert screen.page.locator(".tile b").first.inner_text() == format_bytes(peak.total_bytes)
    for name, size in peak.by_category().items():
        row = screen.page.locator("section", has_text="Peak by category").locator(
            "tr", has=screen.page.get_by_text(name, exact=True)
        )
        assert format_bytes(size) in row.inner_text()
        assert row.locator(f"[title='{size:,} bytes']").count() == 1


def test_addresses_that_people_type(screen: Screen) -> None:
    screen.watch()
    screen.open("overview?run=train/eager")
    assert screen.page.locator("h1").inner_text() == "Overview"
    screen.open("nothing?run=train/eager")
    screen.page.get_by_text("Choose a page from the navigation").wait_for(timeout=READY_MS)
    assert screen.errors == []


def test_layers_show_the_bytes_of_the_api(screen: Screen, runs: Path) -> None:
    layers = attnprof.load(runs / "train" / "eager").layers()
    screen.open("layers?run=train/eager")
    table = screen.page.locator("section", has_text="Attention layers")
    for row in layers.iter_rows(named=True):
        text = table.locator("tr", has_text=row["layer"]).first.inner_text()
        assert format_bytes(row["saved_softmax_bytes"]) in text


def test_growth_shows_the_law_of_the_api(screen: Screen, runs: Path) -> None:
    exponent = Growth.load(runs / "sweep").fit().exponent
    screen.open("growth?run=sweep/measured-000000064")
    assert f"n^{exponent:.2f}" in screen.page.locator(".tiles").inner_text()


def test_cache_shows_what_the_api_holds(screen: Screen, runs: Path) -> None:
    frame = attnprof.load(runs / "decode").kv_cache()
    held = frame.filter(frame["forward"] == frame["forward"].max())["held_bytes"].sum()
    screen.open("kv-cache?run=decode")
    assert screen.page.locator(".tile b").first.inner_text() == format_bytes(held)


def test_compare_shows_both_peaks(screen: Screen, runs: Path) -> None:
    screen.open("compare?run=train/eager&other=train/fused")
    shown = screen.page.locator(".tiles").inner_text()
    for name in ("eager", "fused"):
        peak = attnprof.load(runs / "train" / name).peak().total_bytes
        assert format_bytes(peak) in shown


def test_zoom_asks_again_and_keeps_the_peak(screen: Screen, runs: Path) -> None:
    peak = attnprof.load(runs / "train" / "eager").peak().total_bytes
    screen.open_timeline()
    screen.page.keyboard.press("p")
    screen.wait_for_query("t0", "t1")
    screen.wait_for_readout("s of the run")
    highest = max(screen.traces()["total"])
    unit = 2**20 if peak >= 2**20 else 2**10
    assert highest == pytest.approx(peak / unit, rel=1e-12)
    assert format_bytes(peak) in screen.page.locator("#readout").inner_text()


def test_dragging_zooms_and_double_click_shows_all(screen: Screen) -> None:
    screen.open_timeline()
    screen.drag(0.4, 0.6)
    query = screen.wait_for_query("t0", "t1")
    assert 0 < int(query["t0"]) < int(query["t1"])
    screen.wait_for_readout("s of the run")
    box = screen.page.locator(f"#timeline {PLOT} .nsewdrag").bounding_box()
    assert box is not None
    screen.page.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    screen.wait_for_query(absent=("t0", "t1", "at"))  # nor is an instant left chosen
    screen.wait_for_readout("The whole run")


def test_categories_on_the_screen_sum_to_the_total(screen: Screen) -> None:
    screen.open_timeline()
    traces = screen.traces()
    total = traces.pop("total")
    traces.pop("peak", None)
    # Plotly's `s` is a trace's own height in the stack.
    assert [sum(parts) for parts in zip(*traces.values(), strict=True)] == pytest.approx(total)


def test_click_leads_to_every_block_and_to_one(screen: Screen, runs: Path) -> None:
    screen.open_timeline()
    screen.page.keyboard.press("p")
    screen.wait_for_query("t0")
    screen.wait_for_readout("s of the run")
    screen.click_plot(0.5, "at")
    body = screen.page.locator("#instant")
    body.locator("button.block").first.wait_for(timeout=READY_MS)
    said = re.match(r"(\S+ \S+) live in ([\d,]+) blocks", body.inner_text())
    assert said is not None, body.inner_text()
    button = body.locator("button.block").nth(1)
    number, size = button.get_attribute("data-block"), button.inner_text()
    button.click()
    card = screen.page.locator("#block-card")
    card.wait_for(timeout=READY_MS)
    assert screen.wait_for_query("block")["block"] == number
    allocations = attnprof.load(runs / "train" / "eager").allocations
    row = allocations.row(int(number or 0), named=True)
    assert size == format_bytes(row["size_bytes"])
    assert f"{row['size_bytes']:,} bytes" in card.inner_text()
    assert row["category"] in card.inner_text()


def test_what_came_between_two_instants(screen: Screen) -> None:
    screen.open_timeline(more="&at=10")
    screen.page.locator("[data-pin]").click(timeout=READY_MS)
    assert screen.wait_for_query("since", absent=("at",))["since"] == "10"
    screen.page.locator(".mantine-Drawer-content").wait_for(state="hidden", timeout=READY_MS)
    screen.wait_for_mark("A")
    screen.click_plot(0.5, "at")
    assert screen.query()["since"] == "10"
    between = screen.page.locator("#instant", has_text="Allocated between A and B")
    between.wait_for(timeout=READY_MS)


def test_permalink_restores_what_was_shown(screen: Screen, serving: Serving) -> None:
    screen.open_timeline(more="&at=40&block=3&category=softmax")
    screen.page.locator("#block-card").wait_for(timeout=READY_MS)
    address = screen.page.url
    before = screen.traces(), screen.page.locator("#instant .readout").inner_text()
    screen.page.reload()
    screen.page.locator("#block-card").wait_for(timeout=READY_MS)
    screen.page.wait_for_selector(f"#timeline {PLOT} .nsewdrag", timeout=READY_MS)
    assert screen.page.url == address
    assert (screen.traces(), screen.page.locator("#instant .readout").inner_text()) == before
    assert set(before[0]) == {"softmax"}


def test_keys_step_from_peak_to_peak(screen: Screen) -> None:
    screen.open_timeline()
    screen.page.keyboard.press("]")
    first = screen.wait_for_query("t0")["t0"]
    screen.wait_for_readout("s of the run")
    screen.page.keyboard.press("]")
    screen.page.wait_for_function(
        "(t0) => new URLSearchParams(location.search).get('t0') !== t0", arg=first
    )
    assert int(screen.query()["t0"]) > int(first)
    screen.page.keyboard.press("[")
    screen.page.wait_for_function(
        "(t0) => new URLSearchParams(location.search).get('t0') === t0", arg=first
    )
    screen.page.keyboard.press("0")
    screen.wait_for_query(absent=("t0",))


def test_keys_search_change_colours_and_help(screen: Screen) -> None:
    screen.open("?run=train/eager")
    screen.page.keyboard.press("d")
    dark = "document.documentElement.dataset.mantineColorScheme === 'dark'"
    screen.page.wait_for_function(dark)
    screen.page.reload()
    screen.page.wait_for_selector(PLOT, timeout=READY_MS)
    assert screen.page.evaluate(dark)
    screen.page.keyboard.press("?")
    screen.page.get_by_text("zoom to the peak").wait_for(timeout=READY_MS)
    screen.page.keyboard.press("Escape")
    screen.page.get_by_text("zoom to the peak").wait_for(state="detached", timeout=READY_MS)
    screen.page.keyboard.press("/")
    assert screen.page.evaluate("document.activeElement.id") == "search"
    screen.page.keyboard.type("Growth")
    screen.page.get_by_role("option", name="Growth").first.click()
    screen.page.wait_for_url("**/growth?run=train*")


def test_figures_follow_light_and_dark(screen: Screen) -> None:
    screen.open_timeline()
    colour = "() => document.querySelector('#timeline .js-plotly-plot')._fullLayout.yaxis.gridcolor"
    light = screen.page.evaluate(colour)
    screen.page.keyboard.press("d")
    screen.page.wait_for_function(f"(light) => ({colour})() !== light", arg=light)


def test_run_is_chosen_in_the_header(screen: Screen) -> None:
    screen.open("timeline?run=train/eager")
    screen.page.locator("#run").click()
    screen.page.get_by_role("option", name="decode").click()
    screen.page.wait_for_url("**/timeline?run=decode*")


def test_pages_keep_the_run(screen: Screen) -> None:
    screen.open("?run=train/fused")
    screen.wait_for_query("device")
    screen.page.get_by_role("link", name="Layers").click()
    screen.page.wait_for_url("**/layers?run=train%2Ffused*")


def test_controls_are_in_the_address(screen: Screen) -> None:
    screen.open("growth?run=sweep/measured-000000064&batch_doublings=2")
    screen.page.get_by_text("estimate: batch ×4").first.wait_for(timeout=READY_MS)
    screen.page.locator("input[value^='H100,']").click()
    screen.page.get_by_role("option", name="B200").click()
    assert screen.wait_for_query("capacity")["capacity"] == "B200"
    screen.page.get_by_text("longest n that fits B200").first.wait_for(timeout=READY_MS)


def test_files_are_about_what_is_shown(screen: Screen) -> None:
    screen.open_timeline(more="&category=softmax")
    with screen.page.expect_download() as download:
        screen.page.locator("a[data-export$='.csv']").first.click()
    assert download.value.suggested_filename == "attnprof-train-eager-timeline-timeline.csv"
    with screen.page.expect_download() as picture:
        screen.page.locator("button[data-png]").first.click()
    assert picture.value.suggested_filename.endswith(".png")


def test_saved_page_needs_no_server(screen: Screen, tmp_path: Path) -> None:
    screen.open("?run=train/eager")
    with screen.page.expect_download() as download:
        screen.page.get_by_text("Save page as HTML").click()
    file = tmp_path / "page.html"
    download.value.save_as(file)
    page = screen.page.context.browser.new_page()  # type: ignore[union-attr]  # it has one
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector(PLOT, timeout=READY_MS)
    assert asked == [file.as_uri()]
    page.close()


def test_two_browsers_see_their_own_views(screen: Screen, browser: sync_api.Browser) -> None:
    context = browser.new_context()
    other = Screen(context.new_page(), screen.base)
    other.page.goto(f"{screen.base}?token={TOKEN}")
    screen.open_timeline("train/eager")
    other.open_timeline("decode")
    screen.page.keyboard.press("p")
    screen.wait_for_query("t0")
    assert "t0" not in other.query()
    assert other.query()["run"] == "decode"
    context.close()


def test_stranger_gets_nothing(serving: Serving, browser: sync_api.Browser) -> None:
    context = browser.new_context()
    response = context.new_page().goto(serving.address.partition("?")[0])
    assert response is not None
    assert response.status == 403
    context.close()

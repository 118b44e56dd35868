"""The dashboard without a mouse, on a phone's menu, and without its server."""

from collections.abc import Iterator

import pytest
from browser_screen import PLOT, READY_MS, Screen, needs_browser, sync_api
from known_token import TOKEN

from attnprof_dashboard.serve import Serving

pytestmark = needs_browser


def wait_for(screen: Screen, script: str) -> None:
    screen.page.wait_for_function(script, timeout=READY_MS)


def test_control_keeps_the_focus_while_the_page_is_drawn_anew(screen: Screen) -> None:
    value = "document.activeElement.getAttribute('aria-valuenow')"
    screen.open("growth?run=sweep/measured-000000064")
    slider = screen.page.get_by_role("slider", name="factor of the batch")
    slider.focus()
    before = slider.element_handle()
    for times in ("1", "2"):
        screen.page.keyboard.press("ArrowRight")
        screen.page.get_by_text(f"estimate: batch ×{2 ** int(times)}").first.wait_for()
        wait_for(screen, f"() => {value} === '{times}'")
    assert not before.evaluate("(element) => element.isConnected")
    assert screen.query()["batch_doublings"] == "2"


def test_list_keeps_the_focus_and_stays_closed(screen: Screen) -> None:
    screen.open("growth?run=sweep/measured-000000064")
    chooser = screen.page.get_by_role("textbox", name="has to fit")
    chooser.focus()
    assert chooser.evaluate("(input) => getComputedStyle(input).outlineStyle") == "solid"
    chooser.press("ArrowDown")
    screen.page.get_by_role("option", name="H200").wait_for()
    chooser.press("ArrowDown")
    chooser.press("Enter")
    capacity = screen.wait_for_query("capacity")["capacity"]
    screen.page.get_by_text(f"longest n that fits {capacity}").first.wait_for(timeout=READY_MS)
    wait_for(screen, "() => document.activeElement.id.includes('capacity')")
    assert screen.page.get_by_role("option").and_(screen.page.locator(":visible")).count() == 0


def test_list_that_is_cleared_by_keys_has_the_focus(screen: Screen) -> None:
    screen.open("layers?run=train/eager&step=1")
    screen.page.get_by_role("textbox", name="instant").focus()
    screen.page.keyboard.press("Tab")
    screen.page.keyboard.press("Enter")
    screen.wait_for_query(absent=("step",))
    wait_for(screen, "() => document.activeElement.id.includes('step')")


def test_two_lists_do_not_pass_the_focus_to_each_other(screen: Screen) -> None:
    screen.open("?run=train/eager")
    moves = screen.page.evaluate(
        "async () => { let moves = 0; document.addEventListener('focusin', () => moves++);"
        " for (const id of ['run', 'search']) document.getElementById(id).focus();"
        " await new Promise((done) => setTimeout(done, 500)); return moves; }"
    )
    assert moves == 2
    screen.page.keyboard.press("Escape")


def test_blocks_of_an_instant_are_found_by_keys(screen: Screen) -> None:
    screen.open_timeline()
    screen.page.keyboard.press("b")
    peak = int(screen.wait_for_query("at")["at"])
    screen.page.locator("#instant button.block").first.wait_for(timeout=READY_MS)
    readout = screen.page.locator("#readout").inner_text()
    highest = readout.partition("at most ")[2].partition(" at ")[0]
    assert screen.page.locator("#instant .readout").inner_text().startswith(f"{highest} live in ")
    screen.page.keyboard.press(",")
    wait_for(screen, f"() => Number(new URLSearchParams(location.search).get('at')) < {peak}")
    screen.page.keyboard.press(".")
    wait_for(screen, f"() => Number(new URLSearchParams(location.search).get('at')) === {peak}")
    screen.page.keyboard.press("Escape")
    screen.wait_for_query(absent=("at",))


def test_instant_of_the_layers_is_chosen_by_keys(screen: Screen) -> None:
    screen.open("layers?run=train/eager&step=0")
    screen.page.wait_for_selector(f"{PLOT} .nsewdrag", timeout=READY_MS)
    screen.page.keyboard.press("b")
    screen.wait_for_query("at", absent=("step",))


def test_what_has_no_text_has_a_name(screen: Screen) -> None:
    screen.open_timeline(more="&at=40&category=parameters")
    drawer = screen.page.get_by_role("dialog")
    for name in ("close", "clear", "previous page", "next page"):
        drawer.get_by_role("button", name=name).first.wait_for(timeout=READY_MS)
    screen.page.get_by_role("img", name="Live bytes").wait_for()


def test_what_is_looked_at_lasts_from_page_to_page(screen: Screen) -> None:
    screen.open_timeline(more="&t0=0&t1=100000000&at=40")
    screen.wait_for_query("device")
    screen.page.get_by_role("link", name="Layers").click()
    screen.page.wait_for_url("**/layers?*", timeout=READY_MS)
    query = screen.wait_for_query("run", "device")
    assert (query["t0"], query["t1"], query["at"]) == ("0", "100000000", "40")


def test_run_to_compare_with_lasts_from_run_to_run(screen: Screen) -> None:
    screen.open("compare?run=train/eager&other=train/fused&at=40")
    screen.wait_for_query("device")
    screen.page.locator("#run").click()
    screen.page.get_by_role("option", name="decode").first.click()
    screen.page.wait_for_url("**/compare?run=decode*", timeout=READY_MS)
    query = screen.wait_for_query("device")
    assert query["other"] == "train/fused"
    assert "at" not in query


@pytest.fixture
def unwatched(serving: Serving, browser: sync_api.Browser) -> Iterator[Screen]:
    """Return a page, as wide as a phone, that may complain of a server that is gone."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, reduced_motion="reduce", color_scheme="light"
    )
    found = Screen(context.new_page(), serving.address.partition("?")[0])
    found.page.goto(f"{found.base}?token={TOKEN}")
    yield found
    context.close()


def test_page_says_that_the_server_is_gone_until_it_is_back(unwatched: Screen) -> None:
    page = unwatched.page
    unwatched.open_timeline()
    unwatched.wait_for_query("device")
    banner = page.get_by_role("alert")
    page.route("**/*", lambda route: route.abort())
    page.keyboard.press("p")
    banner.get_by_text("no longer answers").wait_for(timeout=READY_MS)
    page.unroute("**/*")
    banner.wait_for(state="detached", timeout=READY_MS)
    page.route("**/*", lambda route: route.fulfill(status=403))
    page.keyboard.press("0")
    banner.get_by_text("was started anew").wait_for(timeout=READY_MS)


def test_menu_of_a_phone_closes_on_the_chosen_page(unwatched: Screen) -> None:
    unwatched.open("?run=train/eager")
    unwatched.wait_for_query("device")
    right = "document.querySelector('.shell-navbar').getBoundingClientRect().right"
    unwatched.page.get_by_role("button", name="pages").click()
    wait_for(unwatched, f"() => {right} > 100")
    unwatched.page.get_by_role("link", name="Layers").click()
    unwatched.page.wait_for_url("**/layers?*", timeout=READY_MS)
    wait_for(unwatched, f"() => {right} <= 0")
    unwatched.page.get_by_role("button", name="pages").click()
    wait_for(unwatched, f"() => {right} > 100")


def test_help_does_not_move_where_motion_is_unwanted(unwatched: Screen) -> None:
    unwatched.open("?run=train/eager")
    unwatched.page.keyboard.press("?")
    window = unwatched.page.get_by_role("dialog")
    window.wait_for(timeout=READY_MS)
    assert window.evaluate("(window) => getComputedStyle(window).transitionDuration") == "0s"

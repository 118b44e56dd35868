"""The dashboard without a mouse, on a phone's menu, and without its server."""

from collections.abc import Iterator

import pytest
from browser_screen import READY_MS, Screen, needs_browser, sync_api
from known_token import TOKEN

from attnprof_dashboard.serve import Serving

pytestmark = needs_browser


def wait_for(screen: Screen, script: str) -> None:
    screen.page.wait_for_function(script, timeout=READY_MS)


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

"""The dashboard without a mouse, on a phone's menu, and without its server."""

from browser_screen import READY_MS, Screen, needs_browser

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

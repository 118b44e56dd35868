"""What is clicked and typed beyond the timeline's own keys, and what a phone shows."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from browser_screen import PLOT, READY_MS, Screen, needs_browser, sync_api
from known_token import TOKEN

import attnprof
from attnprof.units import format_bytes
from attnprof_dashboard.serve import Serving

pytestmark = needs_browser


def test_step_of_a_rank_leads_to_what_was_live_then(screen: Screen, runs: Path) -> None:
    screen.open("ranks?run=job/rank-0")
    screen.page.locator(f"{PLOT} .nsewdrag").first.wait_for(timeout=READY_MS)
    screen.click_plot(0.75, "at", down=0.75, card="")  # rank 1, step 1
    screen.page.wait_for_url("**/timeline?*", timeout=READY_MS)
    assert screen.wait_for_query("at")["run"] == "job/rank-1"
    screen.page.locator("#instant button.block").first.wait_for(timeout=READY_MS)
    peak = attnprof.load(runs / "job" / "rank-1").peak(step=1)
    said = screen.page.locator("#instant .readout").inner_text()
    assert said.startswith(f"{format_bytes(peak.total_bytes)} live in {len(peak.allocations)}")


def test_timeline_stays_in_sight_of_the_drawer(screen: Screen) -> None:
    screen.open_timeline(more="&at=40")
    screen.page.locator("#instant button.block").first.wait_for(timeout=READY_MS)
    drawer = screen.page.locator(".mantine-Drawer-content").element_handle()
    drawer.wait_for_element_state("stable", timeout=READY_MS)
    screen.click_plot(0.8, "at", down=0.1)
    assert int(screen.query()["at"]) > 40


def test_what_is_typed_replaces_the_chosen_run(screen: Screen) -> None:
    screen.open("?run=train/eager")
    screen.wait_for_query("device")
    screen.page.locator("#run").click()
    screen.page.wait_for_function(
        "() => { const { selectionStart, selectionEnd } = document.getElementById('run');"
        " return selectionEnd > selectionStart; }",
        timeout=READY_MS,
    )
    screen.page.keyboard.type("fused")
    screen.page.get_by_role("option", name="train/fused").click(timeout=READY_MS)
    screen.page.wait_for_url("**/?run=train%2Ffused*", timeout=READY_MS)


def wait_for_text(screen: Screen, text: str) -> None:
    screen.page.get_by_text(text).first.wait_for(timeout=READY_MS)


def test_step_and_click_take_each_others_place(screen: Screen) -> None:
    clicked = re.compile(r"\d\.\d{6} s: ")
    screen.open("layers?run=train/eager&at=50")
    instant = screen.page.get_by_role("textbox", name="instant")
    sync_api.expect(instant).to_have_value(clicked, timeout=READY_MS)
    instant.click()
    screen.page.get_by_role("option", name="peak of step 1").click()
    assert screen.wait_for_query("step", absent=("at",))["step"] == "1"
    sync_api.expect(instant).to_have_value(re.compile("peak of step 1: "), timeout=READY_MS)
    wait_for_text(screen, f"{instant.input_value().partition(': ')[2]} were live at")
    screen.click_plot(0.5, "at", card="section:has-text('The instant')")
    screen.wait_for_query("at", absent=("step",))
    sync_api.expect(instant).to_have_value(clicked, timeout=READY_MS)
    screen.page.locator(".control", has=instant).locator("button").click()
    screen.wait_for_query(absent=("at", "step"))


@pytest.fixture
def phone(serving: Serving, browser: sync_api.Browser) -> Screen:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="light")
    found = Screen(context.new_page(), serving.address.partition("?")[0])
    found.page.goto(f"{found.base}?token={TOKEN}")
    return found


def test_phone_shows_the_run_and_can_search(phone: Screen) -> None:
    phone.open("?run=train/eager")
    phone.wait_for_query("device")
    width = "document.getElementById('run').getBoundingClientRect().width"
    assert phone.page.evaluate(width) > 120
    phone.page.locator("#search").click()
    phone.page.keyboard.type("Growth")
    option = phone.page.get_by_role("option", name="Growth").first
    box = option.bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
    option.click()
    phone.page.wait_for_url("**/growth?run=train*", timeout=READY_MS)
    phone.page.context.close()


def test_controls_do_not_lie_over_each_other_on_a_phone(phone: Screen) -> None:
    phone.open("growth?run=sweep/measured-000000064")
    phone.page.wait_for_selector(".sliders", timeout=READY_MS)
    boxes = phone.page.evaluate(
        "() => [...document.querySelectorAll('.sliders > div')].map((cell) => {"
        " const parts = [...cell.querySelectorAll('*')].map((e) => e.getBoundingClientRect())"
        "   .filter((r) => r.height);"
        " return [Math.min(...parts.map((r) => r.top)), Math.max(...parts.map((r) => r.bottom))];"
        "})"
    )
    assert len(boxes) == 3
    assert all(above[1] <= below[0] for above, below in pairwise(boxes))
    phone.page.context.close()

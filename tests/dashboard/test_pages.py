"""Every page on every kind of run: something to read, the API's numbers, and never an exception."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from flask.testing import FlaskClient
from known_token import TOKEN

import attnprof
from attnprof.growth import Growth
from attnprof.units import format_bytes
from attnprof.vocabulary import Phase
from attnprof_dashboard import ids
from attnprof_dashboard.app import create_app
from attnprof_dashboard.data.catalog import Catalog
from attnprof_dashboard.data.derive import FACTS_FILE, HELD
from attnprof_dashboard.data.store import _run_derive
from attnprof_dashboard.pages import PAGES
from attnprof_dashboard.pages.page import Page, render

HOST = {"Host": "127.0.0.1"}
_PATHS = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
RUNS = ("train/eager", "train/fused", "decode", "sweep/measured-000000128", "failed", "empty")


def show(client: FlaskClient, page: Page, **query: Any) -> str:
    """Return a page as the JSON that goes to the browser."""
    with client.application.test_request_context("/", headers=HOST):
        return json.dumps(render(page, query).to_plotly_json(), default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_plotly_json"):
        return value.to_plotly_json()
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def find_page(name: str) -> Page:
    return next(page for page in PAGES if page.name == name)


@pytest.mark.parametrize("key", [*RUNS, "no such run", "../train/eager", ""])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_shows_something_for_any_run(client: FlaskClient, page: Page, key: str) -> None:
    assert page.title in show(client, page, run=key)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_survives_a_wrong_query(client: FlaskClient, page: Page) -> None:
    query = {
        "t0": "x", "t1": "-9" * 30, "at": "99999999", "since": "-5", "block": "1e9", "step": "-1",
        "layer": "<script>", "category": "none", "device": "cuda:9", "other": "no", "sweep": "no",
        "batch_doublings": "999", "unknown": "1",
    }  # fmt: skip
    assert page.title in show(client, page, run="train/eager", **query)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_of_an_empty_directory_says_how_to_begin(page: Page, tmp_path: Path) -> None:
    app = create_app(Catalog(tmp_path), token=TOKEN, cache=tmp_path / "cache")
    assert "attnprof run" in show(app.server.test_client(), page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_chart_can_be_saved(client: FlaskClient, page: Page) -> None:
    for key in ("train/eager", "decode"):
        response = client.get(f"/export/{page.name}.html?run={key}", headers=HOST)
        assert response.status_code == 200
        text = response.get_data(as_text=True)
        assert "<script src" not in text
        assert "<link" not in text


def save(client: FlaskClient, address: str) -> str:
    response = client.get(f"/export/{address}", headers=HOST)
    assert response.status_code == 200, address
    return response.get_data(as_text=True)


def test_saved_page_says_what_the_page_says(client: FlaskClient, runs: Path) -> None:
    text = save(client, "overview.html?run=train/eager")
    peak = attnprof.load(runs / "train" / "eager").peak()
    assert f"The peak was {format_bytes(peak.total_bytes)}" in text
    assert f"{peak.total_bytes:,} B; peak:" in text
    for name in ("gradients", "forward"):  # the legend of what is drawn
        assert f"</i>{name}</span>" in text
    assert "Save page" not in text


@pytest.mark.parametrize("name", ["ranks", "kv-cache"])
def test_saved_page_says_why_there_is_nothing(client: FlaskClient, name: str) -> None:
    assert 'class="message"' in save(client, f"{name}.html?run=train/eager")


def test_saved_timeline_has_the_instant_and_the_block(client: FlaskClient) -> None:
    query = "?run=train/eager&at=500&block=10"
    rows = read_csv(client, f"timeline/instant.csv{query}")
    total = sum(int(row["size_bytes"]) for row in rows)
    text = save(client, f"timeline.html{query}")
    assert f"{format_bytes(total)} live in {len(rows)} blocks at " in text
    assert text.count("<tr>") > len(rows)
    assert "<h3>Block 10</h3>" in text
    assert "click for every block" not in text
    own = read_csv(client, f"timeline/instant.csv{query}&category=parameters")
    assert 0 < len(own) < len(rows)
    assert {row["category"] for row in own} == {"parameters"}


def test_saved_ranks_invite_to_no_click(client: FlaskClient) -> None:
    text = save(client, "ranks.html?run=job/rank-0")
    assert "an even column is a balanced step." in text
    assert "Click a step" not in text


def test_saved_page_without_an_instant_has_no_list(client: FlaskClient) -> None:
    assert "Live at this instant" not in save(client, "timeline.html?run=train/eager")


def test_readout_says_what_is_drawn_of_a_category(client: FlaskClient) -> None:
    page = find_page("timeline")
    rows = read_csv(client, "timeline/timeline.csv?run=train/eager")
    most = max(int(row["softmax_bytes"]) for row in rows)
    said = f"Of softmax, drawn alone, at most {format_bytes(most)}."
    assert said in show(client, page, run="train/eager", category="softmax")
    unknown = show(client, page, run="train/eager", category="bogus")
    assert "There is no category 'bogus' in this run: all are shown." in unknown
    assert '"name": "softmax"' in unknown


def test_saved_page_has_whole_tables(client: FlaskClient) -> None:
    rows = read_csv(client, "layers/heatmap.csv?run=train/eager")
    assert len(rows) > 50
    text = save(client, "layers.html?run=train/eager")
    assert text.count("<tr>") > len(rows)


def test_sweep_is_no_run_and_says_so(client: FlaskClient) -> None:
    assert "it is a sweep" in show(client, find_page("overview"), run="sweep")
    by_run = show(client, find_page("growth"), run="sweep")
    assert by_run == show(client, find_page("growth"), sweep="sweep")
    assert "grows with" in by_run
    assert "sweep is a sweep; choose a run." in show(
        client, find_page("compare"), run="decode", other="sweep"
    )


def test_unknown_run_is_not_followed(client: FlaskClient) -> None:
    assert "there is no run 'nowhere' here" in show(client, find_page("live"), run="nowhere")


def test_devices_can_be_chosen_while_a_run_is_followed(client: FlaskClient) -> None:
    assert '"devices": ["cpu"]' in show(client, find_page("live"), run="decode")


def test_timelines_name_their_colours(client: FlaskClient) -> None:
    for name in ("overview", "layers", "timeline"):
        page = show(client, find_page(name), run="train/eager")
        assert '"legend-entry' in page
        assert '"backward"' in page


def test_phases_are_compared_in_their_order(client: FlaskClient) -> None:
    rows = read_csv(client, "compare/phases.csv?run=train/eager&other=decode")
    known = [phase.value for phase in Phase]
    found = [known.index(row["phase"]) for row in rows]
    assert found == sorted(found)


def read_csv(client: FlaskClient, address: str) -> list[dict[str, str]]:
    response = client.get(f"/export/{address}", headers=HOST)
    assert response.status_code == 200, address
    return list(csv.DictReader(io.StringIO(response.get_data(as_text=True))))


def test_categories_are_those_of_the_api(client: FlaskClient, runs: Path) -> None:
    rows = read_csv(client, "overview/categories.csv?run=train/eager")
    peak = attnprof.load(runs / "train" / "eager").peak()
    assert {row["category"]: int(row["size_bytes"]) for row in rows} == peak.by_category()


def test_timeline_has_the_peak_and_sums_to_it(client: FlaskClient, runs: Path) -> None:
    rows = read_csv(client, "timeline/timeline.csv?run=train/eager")
    peak = attnprof.load(runs / "train" / "eager").peak()
    assert max(int(row["total_bytes"]) for row in rows) == peak.total_bytes
    for row in rows:
        parts = [int(v) for name, v in row.items() if name not in ("seconds", "total_bytes")]
        assert sum(parts) == int(row["total_bytes"])


def test_heatmap_is_the_api_by_layer(client: FlaskClient, runs: Path) -> None:
    rows = read_csv(client, "layers/heatmap.csv?run=train/eager")
    expected = attnprof.load(runs / "train" / "eager").peak().by_layer()
    assert sorted(int(r["size_bytes"]) for r in rows) == sorted(expected["size_bytes"].to_list())


def find_list(client: FlaskClient, page: Page, field: str, **query: Any) -> dict[str, Any]:
    """Return the list of a page from which a field of the view is chosen."""
    found: list[dict[str, Any]] = []

    def look(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("id") == ids.choose(field):
                found.append(part)
            part = list(part.values())
        if isinstance(part, list):
            for each in part:
                look(each)

    look(json.loads(show(client, page, **query)))
    (one,) = found
    return one


def test_instant_that_is_shown_is_named_in_its_list(client: FlaskClient) -> None:
    def name(**query: str) -> str:
        found = find_list(client, find_page("layers"), "step", run="train/eager", **query)
        labels = {item["value"]: item["label"] for item in found["data"]}
        return str(labels.get(found["value"], ""))

    assert name() == ""
    assert name(step="1").startswith("peak of step 1")
    for query in ({"at": "50"}, {"at": "50", "step": "1"}):
        clicked = name(**query)
        seconds, _, size = clicked.partition(" s: ")
        page = show(client, find_page("layers"), run="train/eager", **query)
        assert f"{size} were live at {seconds} s" in page


def test_growth_of_a_run_in_no_sweep_is_no_strangers(client: FlaskClient) -> None:
    growth = find_page("growth")
    page = show(client, growth, run="job/rank-0")
    assert "it belongs to no sweep" in page
    assert "grows with" not in page
    sweeps = find_list(client, growth, "sweep", run="job/rank-0")
    assert [item["value"] for item in sweeps["data"]] == [".", "sweep"]
    assert "grows with" in show(client, growth, run="job/rank-0", sweep="sweep")
    inside = "sweep/measured-000000064"
    assert find_list(client, growth, "sweep", run=inside)["value"] == "sweep"
    alone = show(client, growth, run=inside, sweep=sweeps["data"][0]["value"])
    assert "The steps of this run have one length." in alone
    assert "grows with" not in alone


def test_cache_is_that_of_the_api(client: FlaskClient, runs: Path) -> None:
    rows = read_csv(client, "kv-cache/forwards.csv?run=decode")
    frame = attnprof.load(runs / "decode").kv_cache()
    held = dict(frame.group_by("forward").agg(pl.col("held_bytes").sum()).iter_rows())
    assert {int(r["forward"]): int(r["held_bytes"]) for r in rows} == held


def test_growth_is_that_of_the_api(client: FlaskClient, runs: Path) -> None:
    rows = read_csv(client, "growth/growth.csv?run=sweep/measured-000000128")
    growth = Growth.load(runs / "sweep")
    found = {int(row["seq_len"]): int(row["peak_bytes"]) for row in rows}
    assert found == {n: growth.run(n).peak().total_bytes for n in (32, 64, 128)}


def test_comparison_sums_to_the_difference(client: FlaskClient, runs: Path) -> None:
    first, second = (
        attnprof.load(runs / "train" / name).peak().total_bytes for name in ("eager", "fused")
    )
    for chart in ("categories", "layers"):
        rows = read_csv(client, f"compare/{chart}.csv?run=train/eager&other=train/fused")
        assert sum(int(row["difference_bytes"]) for row in rows) == second - first


def test_comparison_is_there_for_programs(client: FlaskClient, runs: Path) -> None:
    address = "/export/compare.json?run=train/eager&other=train/fused"
    values = client.get(address, headers=HOST).get_json()
    first, second = (
        attnprof.load(runs / "train" / name).peak().total_bytes for name in ("eager", "fused")
    )
    assert values["difference_bytes"] == second - first
    for parts in (values["by_category"], values["by_layer"]):
        assert sum(part["difference_bytes"] for part in parts) == second - first


@pytest.mark.parametrize("address", ["none.html", "overview/none.csv", "none/none.csv"])
def test_unknown_file_is_not_found(client: FlaskClient, address: str) -> None:
    assert client.get(f"/export/{address}", headers=HOST).status_code == 404


def test_overview_of_nothing_draws_nothing(client: FlaskClient) -> None:
    page = show(client, find_page("overview"), run="failed")
    assert "Nothing was recorded" in page
    assert "sums to the peak" not in page


def test_what_ended_a_run_is_shown_as_text(client: FlaskClient) -> None:
    assert "<b>nothing</b>" in show(client, find_page("overview"), run="failed")
    response = client.get("/export/overview.html?run=failed", headers=HOST)
    assert "<b>nothing</b>" not in response.get_data(as_text=True)


def test_truncated_run_says_so(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "train" / "eager", tmp_path / "runs" / "cut")
    table = tmp_path / "runs" / "cut" / "tables" / "ops.arrows"
    table.write_bytes(table.read_bytes()[: table.stat().st_size * 2 // 3])
    app = create_app(Catalog(tmp_path / "runs"), token=TOKEN, cache=tmp_path / "cache")
    text = show(app.server.test_client(), find_page("overview"), run="cut")
    assert "Truncated" in text


def test_damaged_table_has_a_page(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "train" / "eager", tmp_path / "runs" / "bad")
    table = tmp_path / "runs" / "bad" / "tables" / "storage_events.arrows"
    table.write_bytes(b"\0" * table.stat().st_size)
    app = create_app(Catalog(tmp_path / "runs"), token=TOKEN, cache=tmp_path / "cache")
    client = app.server.test_client()
    for page in PAGES:
        assert "cannot be" in show(client, page, run="bad")


def test_run_that_is_deleted_while_open_stays_usable(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnprof_dashboard.data.catalog._FRESH_SECONDS", 0.0)
    shutil.copytree(runs / "train" / "eager", tmp_path / "runs" / "gone")
    app = create_app(Catalog(tmp_path / "runs"), token=TOKEN, cache=tmp_path / "cache")
    client = app.server.test_client()
    before = show(client, find_page("timeline"), run="gone")
    shutil.rmtree(tmp_path / "runs" / "gone")
    after = show(client, find_page("timeline"), run="gone")
    assert "Deleted" not in before
    assert "Deleted" in after
    assert "Live bytes" in after


def test_long_run_is_read_in_a_process_that_ends_with_the_server(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnprof_dashboard.data.store._LONG_RUN_BYTES", 0)
    out = tmp_path / "good" / "run"
    out.mkdir(parents=True)
    _run_derive(runs / "train" / "eager", out)
    assert (out / FACTS_FILE).exists()
    # Standard input at its end stands for a server that was killed.
    out = tmp_path / "alone" / "run"
    out.mkdir(parents=True)
    slowly = (
        "import time, attnprof_dashboard.data.derive as module; "
        "module.derive = lambda *_: time.sleep(60); module.main()"
    )
    command = [sys.executable, "-c", slowly, str(runs), str(out), HELD]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, env=_PATHS, check=False)
    assert done.returncode == 1
    assert not out.parent.exists()


def test_pages_leave_torch_out() -> None:
    code = (
        "import sys, attnprof_dashboard.app, attnprof_dashboard.data.derive; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_PATHS
    )
    assert done.stdout.strip() == "False"

"""How fast the dashboard answers on long runs, in the server and in a browser.

    python benchmarks/dashboard.py --events 1M 10M

Makes runs with `synthetic_runs.py`, derives what the dashboard shows of them, and measures: opening
the mapped files, a window of the timeline, the size of what is sent, the memory of the server, and
with Chromium the time to the first paint, to the first plot, and from the release of a zoom to the
new data on the screen.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Target, add_options, make_table, save_results, show_machine, show_targets
from rich.console import Console
from synthetic_runs import make_run, read_count

Results = dict[str, Any]

ROOT = Path(__file__).parents[1]
_TOKEN = "benchmark-token-of-no-value"
_WINDOWS = 200


def measure_import() -> float:
    """Return the seconds that importing the app takes in a fresh process."""
    code = (
        "import time; begin = time.perf_counter(); import attnprof_dashboard.app; "
        "print(time.perf_counter() - begin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)


def measure_data(folder: Path) -> Results:
    """Open derived files and ask for windows and blocks; to be called in a fresh process."""
    from attnprof_dashboard.data.digest import Digest
    from attnprof_dashboard.figures.timeline import Marks, draw_timeline

    begin = time.perf_counter()
    device = Digest(folder).device()
    index = device.index
    peak = device.peak_event
    opened = time.perf_counter() - begin
    chance = random.Random(0)
    queries, sizes, kept = [], [], 0
    for number in range(_WINDOWS):
        first, last = sorted(chance.uniform(index.begin_ns, index.end_ns) for _ in range(2))
        begin = time.perf_counter()
        window = index.window(int(first), int(last))
        queries.append(time.perf_counter() - begin)
        inside = slice(max(index.event_at(int(first)), 0), index.event_at(int(last)) + 1)
        kept += int(window.total_bytes.max()) == int(index.total_bytes[inside].max())
        if number % 10 == 0:
            figure = draw_timeline(window, Marks(index.begin_ns), scheme="light")
            sizes.append(len(gzip.compress(figure.to_json().encode(), 6)))
    begin = time.perf_counter()
    live = len(device.live_at(peak))
    return {
        "events": len(index),
        "open_seconds": opened,
        "window_seconds": statistics.median(queries),
        "window_worst_seconds": max(queries),
        "windows_with_their_peak": kept,
        "windows": _WINDOWS,
        "payload_bytes": max(sizes),
        "live_blocks": live,
        "live_seconds": time.perf_counter() - begin,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def derive(run: Path, folder: Path) -> Results:
    """Derive what is shown of a run, in a process of its own, and say what that took."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "attnprof_dashboard.data.derive", str(run), str(folder)]
    begin = time.perf_counter()
    subprocess.run(command, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"seconds": time.perf_counter() - begin, "peak_rss_bytes": used, "size_bytes": size}


def measure_browser(runs: Path, cache: Path, rounds: int) -> Results | None:
    """Open the timeline in Chromium and zoom; None if there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(runs), str(cache)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            found = _drive(browser, address, rounds)
            browser.close()
        found["server_rss_bytes"] = _read_rss(server.pid)
    finally:
        server.terminate()
        server.wait()
    return found


def _drive(browser: Any, address: str, rounds: int) -> Results:
    base = address.partition("?")[0]
    plot = "#timeline .js-plotly-plot .nsewdrag"
    times: dict[str, list[float]] = {"cold": [], "warm": [], "paint": [], "zoom": []}
    foreign: list[str] = []
    for _ in range(rounds):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(base) else None)
        page.goto(f"{base}?{address.partition('?')[2]}&run=none")  # the cookie, and no plot
        for name in ("cold", "warm"):
            begin = time.perf_counter()
            page.goto(f"{base}timeline")
            page.wait_for_selector(plot, timeout=120_000)
            times[name].append(time.perf_counter() - begin)
        times["paint"].append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            / 1000
        )
        for at in (0.3, 0.5, 0.6):
            times["zoom"].append(_zoom(page, at))
        context.close()
    return {
        **{f"{name}_seconds": statistics.median(values) for name, values in times.items()},
        "foreign_requests": len([url for url in foreign if not url.startswith(("data:", "blob:"))]),
    }


def _zoom(page: Any, at: float) -> float:
    """Zoom by dragging; return the seconds from release to the redrawn figure."""
    box = page.locator("#timeline .nsewdrag").bounding_box()
    y = box["y"] + box["height"] / 2
    page.evaluate(
        "() => { const g = document.querySelector('#timeline .js-plotly-plot');"
        " window.redrawn = null; const before = g.data[0].x;"
        " const wait = () => { if (g.data[0].x !== before) window.redrawn = performance.now();"
        " else requestAnimationFrame(wait); }; wait();"
        " document.addEventListener('mouseup', () => { window.released = performance.now(); },"
        " { capture: true, once: true }); }"
    )
    page.mouse.move(box["x"] + at * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + (at + 0.2) * box["width"], y, steps=3)
    page.mouse.up()
    page.wait_for_function("() => window.redrawn !== null", timeout=60_000)
    seconds = page.evaluate("(window.redrawn - window.released) / 1000")
    page.keyboard.press("0")
    page.wait_for_function("() => !location.search.includes('t0=')")
    page.wait_for_timeout(500)
    return float(seconds)


def _read_rss(pid: int) -> int:
    import psutil

    return int(psutil.Process(pid).memory_info().rss)


def serve(runs: Path, cache: Path) -> None:
    """Serve until terminated; print the address."""
    from attnprof_dashboard.serve import bind

    serving = bind(runs, port=0, token=_TOKEN, cache=cache)
    print(serving.address, flush=True)
    serving.run()


def benchmark(events: int, scratch: Path, rounds: int, run: Path | None) -> Results:
    """Make a run, derive it and measure all."""
    runs = scratch / f"runs-{events}"
    if run is None:
        make_run(runs / "synthetic", events)
    else:
        runs.mkdir(parents=True)
        shutil.copytree(run, runs / "synthetic", copy_function=os.link)
    from attnprof_dashboard.data.catalog import Catalog
    from attnprof_dashboard.data.store import DigestStore

    cache = scratch / f"cache-{events}"
    folder = cache / DigestStore(Catalog(runs), cache).fingerprint((runs / "synthetic").resolve())
    found: Results = {"derived": derive(runs / "synthetic", folder)}
    command = [sys.executable, __file__, "--data", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found["data"] = json.loads(done.stdout)
    found["browser"] = measure_browser(runs, cache, rounds)
    return found


def list_targets(results: Results, import_seconds: float) -> list[Target]:
    """Return what the dashboard is held to, at the largest run that was measured."""
    data, browser = results["data"], results["browser"]
    targets = [
        Target("import, s", import_seconds, 2),
        Target("open, ms", 1e3 * data["open_seconds"], 50),
        Target("window, median, ms", 1e3 * data["window_seconds"], 30),
        Target("payload, KB", data["payload_bytes"] / 1e3, 80),
        Target("windows without their peak", data["windows"] - data["windows_with_their_peak"], 0),
    ]
    if browser is not None:
        targets += [
            Target("first contentful paint, s", browser["paint_seconds"], 0.3),
            Target("first plot, cold, s", browser["cold_seconds"], 3),
            Target("first plot, warm, s", browser["warm_seconds"], 1),
            Target("zoom to new data, ms", 1e3 * browser["zoom_seconds"], 400),
            Target("server RSS, MiB", browser["server_rss_bytes"] / 2**20, 512),
            Target("requests to other hosts", browser["foreign_requests"], 0),
        ]
    return targets


def show(console: Console, results: dict[str, Results]) -> None:
    """Print what was measured per size."""
    table = make_table("Per run", ["", *results])
    rows = [
        ("deriving, s", lambda r: r["derived"]["seconds"]),
        ("deriving, peak RSS, MiB", lambda r: r["derived"]["peak_rss_bytes"] / 2**20),
        ("derived files, MiB", lambda r: r["derived"]["size_bytes"] / 2**20),
        ("opening, ms", lambda r: 1e3 * r["data"]["open_seconds"]),
        ("window, median, ms", lambda r: 1e3 * r["data"]["window_seconds"]),
        ("window, worst, ms", lambda r: 1e3 * r["data"]["window_worst_seconds"]),
        ("payload, compressed, KB", lambda r: r["data"]["payload_bytes"] / 1e3),
        ("blocks live at the peak, ms", lambda r: 1e3 * r["data"]["live_seconds"]),
    ]
    for name, read in rows:
        table.add_row(name, *(f"{read(r):,.1f}" for r in results.values()))
    console.print(table)


def main() -> None:
    """Measure every size that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, rounds=3)
    parser.add_argument("--events", nargs="+", default=["1M"], metavar="N", help="default: 1M")
    parser.add_argument("--run", type=Path, metavar="DIR", help="measure this run, make none")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    if options.data is not None:
        print(json.dumps(measure_data(options.data)))
        return
    if options.serve is not None:
        serve(*options.serve)
        return
    console = Console(width=130)
    show_machine(console)
    import_seconds = min(measure_import() for _ in range(options.rounds))
    with tempfile.TemporaryDirectory(prefix="attnprof-benchmark-") as scratch:
        results = {
            size: benchmark(read_count(size), Path(scratch), options.rounds, options.run)
            for size in options.events
        }
    show(console, results)
    targets = list_targets(list(results.values())[-1], import_seconds)
    show_targets(console, targets)
    save_results(options.json, "dashboard", results, targets)


if __name__ == "__main__":
    main()

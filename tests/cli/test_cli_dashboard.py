"""``attnprof dashboard``: where it is, what it refuses, and how it is offered."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import HTTPCookieProcessor, build_opener

import pytest
from cli_calls import ROOT

from attnprof.cli import dashboard
from attnprof.cli.doctor import examine
from attnprof.errors import CommandError

PATHS = f"{ROOT}:{ROOT / 'dashboard'}"


def test_dashboard_serves_the_address_it_prints(recorded: Path) -> None:
    command = [sys.executable, "-m", "attnprof", "dashboard", "--port", "0", "--no-browser", "."]
    with subprocess.Popen(
        command, cwd=recorded, env={"PYTHONPATH": PATHS, "HOME": str(recorded)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", process.stdout.readline())
        assert address is not None
        with build_opener(HTTPCookieProcessor()).open(address[0], timeout=60) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "no directory none"),
        ([".", "--host", "0.0.0.0"], "--token"),
        ([".", "--port", "99999"], "give another --port"),
        ([".", "--host", "nowhere.invalid", "--token", "0123456789abcdef"], "give a --host that"),
        ([".", "--host", "192.0.2.1", "--token", "0123456789abcdef"], "give a --host that"),
    ],
)
def test_dashboard_refuses_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "attnprof", "dashboard", "--no-browser", *arguments]
    environment = {"PYTHONPATH": PATHS, "HOME": str(tmp_path)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_dashboard_names_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: name != "waitress" or None)
    with pytest.raises(CommandError, match=r"waitress; pip install 'attnprof\[dashboard\]'"):
        dashboard.dashboard(tmp_path)


@pytest.mark.parametrize("missing", ["dash_mantine_components", "waitress"])
def test_doctor_asks_for_what_the_dashboard_needs(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: name != missing or None)
    (found,) = [check for check in examine() if check.subject == "dash"]
    assert not found.ok
    assert f"the dashboard needs {missing}; pip install" in found.detail


def test_offer_prints_the_command_where_nobody_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.offer_dashboard(tmp_path / "my runs")
    assert f"attnprof dashboard '{tmp_path}/my runs'" in capsys.readouterr().out

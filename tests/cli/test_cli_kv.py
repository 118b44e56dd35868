"""``attnprof kv``: the cache of a run, as text and as JSON."""

import json
from pathlib import Path

import pytest
import torch

import attnprof
from attnprof.cli import main
from attnprof.theory.devices import find_device
from attnprof.units import format_bytes
from tests.attribution.test_caches_by_hand import LAYERS, PROMPT, TOKEN, Model, concatenate, embed


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "decoded"
    model = Model(concatenate).eval()
    with attnprof.trace(directory, samples_per_second=0), torch.no_grad():
        output, past = model(embed(), [None] * LAYERS, 0)
        output, past = model(output[:, -1:], past, PROMPT)
        output.argmax()
    return directory


def test_report_shows_growth_layers_forms_and_what_fits(
    decoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", str(decoded), "--device", "H100"]) == 0
    text = capsys.readouterr().out
    for words in ("prefill", "decode", "layers.[0-1]", "grown", "FP8", "MQA", "on one H100"):
        assert words in text
    assert "as the architecture says" in text


def test_json_has_the_rows_and_their_sum(decoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", str(decoded), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["rows"]) == 2 * LAYERS
    assert values["held_bytes"] == LAYERS * 2 * (PROMPT + 1) * TOKEN


def test_json_says_how_many_sequences_fit(
    decoded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kv", str(decoded), "--json", "--device", "H100"]) == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert [fit["tokens"] for fit in fits] == [4096, 8192, 32768, 131072]
    room = find_device("H100").available_bytes
    for fit in fits:
        assert fit["sequences"] * fit["sequence_bytes"] <= room
        assert (fit["sequences"] + 2) * fit["sequence_bytes"] > room - 2**20  # weights are small


def test_weights_are_those_that_live_beside_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with attnprof.trace(tmp_path / "run", samples_per_second=0), torch.no_grad():
        first = torch.nn.Linear(512, 512)
        first(torch.ones(1, 512)).sum()
        del first
        model = Model(concatenate).eval()
        output, past = model(embed(), [None] * LAYERS, 0)
        output, past = model(output[:, -1:], past, PROMPT)
        del output, past
        later = torch.nn.Linear(512, 512)
        later(torch.ones(1, 512)).sum()
    assert main(["kv", str(tmp_path / "run"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 0 < values["weights_bytes"] == own
    assert main(["kv", str(tmp_path / "run"), "--device", "H100"]) == 0
    assert f"beside {format_bytes(own)} of weights" in capsys.readouterr().out


def test_reports_show_the_cache(
    decoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(decoded)]) == 0
    assert "of an older copy while a longer one was made" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["report", str(decoded), "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["kv_cache"]
    assert cache["held_bytes"] == LAYERS * 2 * (PROMPT + 1) * TOKEN
    assert cache["growing_bytes"] > 0
    assert main(["report", str(decoded), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<div class="strip"') == LAYERS


def test_run_without_a_cache_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with attnprof.trace(tmp_path / "run", samples_per_second=0):
        torch.nn.Linear(3, 3)(torch.ones(2, 3)).sum().backward()
    assert main(["kv", str(tmp_path / "run")]) == 0
    assert "No forward without gradients" in capsys.readouterr().out


def test_decoding_with_gradients_on_is_told_how_to_leave_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(concatenate).eval()
    with attnprof.trace(tmp_path / "run", samples_per_second=0):
        output, past = model(embed(), [None] * LAYERS, 0)
        output, past = model(output[:, -1:], past, PROMPT)
        output.argmax()
    assert main(["kv", str(tmp_path / "run")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 forwards kept what a backward needs instead" in text
    assert "torch.no_grad()" in text


def test_unknown_device_is_one_line(decoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kv", str(decoded), "--device", "H1000"]) == 2
    assert "no device named 'H1000'" in capsys.readouterr().err

"""A directory of runs as people have them, and the dashboard on it."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flask.testing import FlaskClient
from known_token import TOKEN

if TYPE_CHECKING:
    from browser_screen import Screen
    from playwright import sync_api

    from attnprof_dashboard.serve import Serving


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two trainings, a decoding, a sweep, and runs that did not go well."""
    import models
    import torch

    import attnprof

    root = tmp_path_factory.mktemp("dashboard") / "runs"
    torch.manual_seed(0)
    for name, attention in (("eager", "eager"), ("fused", "sdpa")):
        case = models.make_gpt2(attention)
        optimizer = torch.optim.AdamW(case.model.parameters())
        with attnprof.trace(root / "train" / name):
            for _ in range(3):
                case.train()
                optimizer.step()
                optimizer.zero_grad()
    _record_decoding(root / "decode")
    attnprof.sweep(_make_step, seq_lens=[32, 64, 128], directory=root / "sweep", isolate=False)
    for rank in range(2):
        _record_rank(root / "job" / f"rank-{rank}", batch=1 + rank)
    with pytest.raises(ImportError), attnprof.trace(root / "failed"):
        raise ImportError("no module named '<b>nothing</b>'")
    (root / "empty").mkdir()
    return root


def _record_rank(path: Path, batch: int) -> None:
    """Record two steps of one process of a job."""
    import torch

    import attnprof

    layer = torch.nn.Linear(32, 32)
    with attnprof.trace(path) as tracer:
        for _ in range(2):
            layer(torch.randn(batch, 64, 32)).square().mean().backward()
            layer.zero_grad()
            tracer.step()


def _record_decoding(path: Path) -> None:
    """Record a prompt and a few tokens of a tiny Llama with grouped queries."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import attnprof

    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad(), attnprof.trace(path):
        out = model(torch.randint(0, 61, (2, 20)), use_cache=True)
        for _ in range(4):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)


def _make_step(seq_len: int, device: str) -> Callable[[], None]:
    """Return one training step of a layer with materialised attention."""
    import torch
    from torch import nn

    with torch.device(device):
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        x = torch.randn(2, seq_len, 16)

    def step() -> None:
        layer(x).square().mean().backward()
        layer.zero_grad()

    return step


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where derived files are kept."""
    return tmp_path_factory.mktemp("derived")


@pytest.fixture
def client(runs: Path, cache: Path) -> Iterator[FlaskClient]:
    """Return a client that knows the token."""
    from attnprof_dashboard.app import create_app
    from attnprof_dashboard.data.catalog import Catalog

    app = create_app(Catalog(runs), token=TOKEN, cache=cache)
    with app.server.test_client() as found:
        found.get(f"/?token={TOKEN}", headers={"Host": "127.0.0.1"})
        yield found


@pytest.fixture(scope="module")
def serving(runs: Path, cache: Path) -> "Iterator[Serving]":
    """Return a server of the runs."""
    from attnprof_dashboard.serve import bind

    found = bind(runs, port=0, token=TOKEN, cache=cache)
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    yield found
    found.close()
    thread.join(timeout=10)


@pytest.fixture(scope="module")
def browser() -> "Iterator[sync_api.Browser]":
    """Return Debian's browser."""
    from browser_screen import CHROMIUM
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def screen(serving: "Serving", browser: "sync_api.Browser") -> "Iterator[Screen]":
    """Return a page of the browser that is let in; it must ask nobody else, nor complain."""
    from browser_screen import Screen

    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    found = Screen(context.new_page(), serving.address.partition("?")[0])
    found.watch()
    found.page.goto(serving.address)
    yield found
    context.close()
    assert found.foreign == []
    assert found.errors == []

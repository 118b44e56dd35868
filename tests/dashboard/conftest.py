"""A directory of runs as people have them, and the dashboard on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

TOKEN = "a-token-for-tests"


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
    with pytest.raises(ImportError), attnprof.trace(root / "failed"):
        raise ImportError("no module named '<b>nothing</b>'")
    (root / "empty").mkdir()
    return root


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

"""What the model may take: three tests that hold, and one that fails on purpose."""

import pytest
from model import LanguageModel, train


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A model that was made before any test is measured."""
    return LanguageModel()


@pytest.mark.memory_budget(peak="6 MiB", saved_softmax=0, leaked=0)
@pytest.mark.no_materialised_scores
def test_step(model: LanguageModel) -> None:
    """One step at 256 tokens."""
    train(model, 256)


@pytest.mark.memory_growth(seq_lens=[64, 128, 256, 512], at_most="linear")
def test_growth(model: LanguageModel, seq_len: int) -> None:
    """The step at four lengths, for real."""
    train(model, seq_len)


@pytest.mark.memory_budget(peak="80 GB")
@pytest.mark.memory_growth(seq_lens=["64K", "256K", "1M"], at_most="linear", dry_run=True)
def test_million_tokens(seq_len: int) -> None:
    """A million tokens fit, and nothing has to be there that holds them."""
    train(LanguageModel(), seq_len)


@pytest.mark.no_materialised_scores
def test_dropout() -> None:
    """Fails on purpose: on the CPU, SDPA with dropout writes the scores out."""
    train(LanguageModel(dropout=0.1), 256)

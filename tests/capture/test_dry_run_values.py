"""What a dry run knows of values, and what it assumes where it cannot know them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnprof.capture.dry_run import dry_run
from attnprof.errors import DryRunError, LengthError

WITHOUT_GRADIENTS = [torch.no_grad, torch.inference_mode]


def assumed_by(use: Callable[[], Any]) -> list[str]:
    """Return what a dry run of one function assumes, without the places."""
    run = dry_run(lambda seq_len, device: use, 8, steps=1)
    return [line.split(" at /")[0] for line in run.info["dry_run"]["assumptions"]]


@pytest.mark.parametrize("mode", [torch.enable_grad, *WITHOUT_GRADIENTS])
def test_what_is_written_through_a_view_is_known(mode: Callable[[], Any]) -> None:
    def use() -> None:
        with mode():
            mask = torch.ones(2, 8)
            mask[0, :3] = 0
            assert not mask.all()
            assert mask.sum().item() == 13
            turned = mask.t()
            turned[7].fill_(5)
            assert mask[:, 7].tolist() == [5, 5]

    assert assumed_by(use) == []


@pytest.mark.parametrize("mode", WITHOUT_GRADIENTS)
def test_what_is_written_and_unknown_is_forgotten(mode: Callable[[], Any]) -> None:
    def use() -> None:
        with mode():
            unknown = torch.randn(2, 8)
            whole, part, alias = torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 8)
            whole.copy_(unknown)
            part[:, 0] = unknown[:, 0]
            alias.data.mul_(unknown)
            for tensor in (whole, part, alias):
                with pytest.raises(DryRunError, match="value of a bool tensor"):
                    bool((tensor > 0).all())

    assert assumed_by(use) == []


def test_losses_compare_as_they_are_read() -> None:
    def use() -> None:
        loss = torch.randn(4, 4).square().mean()
        assert loss < float("inf")
        assert not loss > 1e9
        assert loss <= loss.item()

    assert set(assumed_by(use)) == {"a value that a dry run cannot know was read as 1.0"}


def test_draws_that_decide_are_followed() -> None:
    def use() -> None:
        assert torch.rand(()) < 1
        assert -1 < torch.empty(1).uniform_(-1, 1).item() < 1
        kept = torch.rand(2, 64) < 0.5
        torch.randn(2, 64, 3)[kept]
        decisions = [(torch.rand([]) < 0.5).item() for _ in range(64)]
        assert set(decisions) == {False, True}

    assert set(assumed_by(use)) == {
        "numbers drawn at random were read",
        "numbers drawn at random decided on a shape",
    }


@pytest.mark.parametrize("mode", WITHOUT_GRADIENTS)
@pytest.mark.parametrize(
    "choose",
    [
        lambda logits: logits.argmax(-1),
        lambda logits: logits.softmax(-1).multinomial(1)[:, 0],
        lambda logits: logits.topk(3)[1].gather(1, logits.softmax(-1)[:, :3].multinomial(1))[:, 0],
    ],
)
def test_generation_meets_no_end_token(
    mode: Callable[[], Any], choose: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    lengths = []

    def use() -> None:
        with mode():
            ids, ended = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
            while ids.shape[1] < 8:
                token = choose(torch.randn(2, 50))
                ids = torch.cat([ids, token[:, None]], 1)
                ended = ended | (token == 7) | torch.isin(token, torch.tensor([1, 2]))
                if ended.all() or token[0].item() == 9:
                    break
            lengths.append(ids.shape[1])
            assert len(ids.tolist()[1]) == 8

    lines = assumed_by(use)
    assert lengths == [8]
    assert "tokens that a dry run cannot know were taken for no end token" in lines


def test_routes_to_experts_are_not_guessed() -> None:
    def use() -> None:
        route = torch.randn(8, 4).argmax(-1)
        (route == 1).any().item()

    with pytest.raises(DryRunError, match="value of a bool tensor"):
        assumed_by(use)

    @torch.no_grad()
    def infer() -> None:
        (torch.randn(8, 4).argmax(-1) == 1).nonzero()

    with pytest.raises(DryRunError, match="shape of a result depends on the values"):
        assumed_by(infer)


TABLES: dict[str, Callable[[int, torch.Tensor], Any]] = {
    "embedding": lambda n, rows: torch.nn.functional.embedding(torch.arange(n), rows),
    "index": lambda n, rows: rows[torch.arange(n)],
    "second index": lambda n, rows: rows.t()[:, torch.arange(n)],
    "index_select": lambda n, rows: rows.index_select(0, torch.arange(n)),
}


@pytest.mark.parametrize("name", TABLES)
def test_lengths_beyond_a_table_are_refused(name: str) -> None:
    def make_step(seq_len: int, device: str) -> Callable[[], Any]:
        rows = torch.randn(64, 4)
        return lambda: TABLES[name](seq_len, rows)

    (table,) = dry_run(make_step, 48).info["dry_run"]["tables"]
    assert (table["rows"], table["used"]) == (64, 48)
    assert "test_dry_run_values.py:" in table["at"]
    with pytest.raises(LengthError, match=r"row 64 of a table of 64 rows is looked up at .*\.py:"):
        dry_run(make_step, 65)


def test_slices_tell_how_much_of_a_table_is_used() -> None:
    def make_step(seq_len: int, device: str) -> Callable[[], Any]:
        rows = torch.randn(1, 64, 4)
        return lambda: rows[:, :seq_len]

    (table,) = dry_run(make_step, 48).info["dry_run"]["tables"]
    assert (table["rows"], table["used"]) == (64, 48)

"""Growth of real models and real loops: fitted short, predicted long, found without a sweep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprof
from attnprof.capture.sweep import sweep
from attnprof.capture.workload import record_workload
from attnprof.growth import Growth
from attnprof.run import Run
from tests.capture.sweep_steps import (
    TOO_MANY_BYTES,
    WIDTH,
    Attention,
    make_inference,
    make_step,
)

VOCABULARY = 61
WINDOW = 16


def train(model: Any, n: int) -> Callable[[], None]:
    tokens = torch.randint(2, VOCABULARY, (1, n))
    optimizer = torch.optim.AdamW(model.train().parameters())

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_gpt2(attention: str, dropout: float) -> Callable[[int, str], Callable[[], None]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(n: int, device: str) -> Callable[[], None]:
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=n, n_embd=32, n_layer=2, n_head=4,
            attn_pdrop=dropout, attn_implementation=attention, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM",
        )  # fmt: skip
        return train(GPT2LMHeadModel(config).to(device), n)

    return make


def make_longformer(n: int, device: str) -> Callable[[], None]:
    from transformers import LongformerConfig, LongformerForMaskedLM

    config = LongformerConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, attention_window=WINDOW, max_position_embeddings=n + 8,
        pad_token_id=1,
    )  # fmt: skip
    return train(LongformerForMaskedLM(config).to(device), n)


@pytest.mark.parametrize(
    ("make", "exponent"),
    [(make_gpt2("eager", 0.1), 2), (make_gpt2("sdpa", 0.0), 0), (make_longformer, 1)],
    ids=["materialised", "fused", "banded"],
)
def test_growth_predicts_four_times_the_longest_length(
    make: Callable[[int, str], Callable[[], None]], exponent: float
) -> None:
    growth = sweep(make, [2 * WINDOW, 3 * WINDOW, 4 * WINDOW, 8 * WINDOW])
    peak = record_workload(make, 32 * WINDOW).peak()
    predicted = growth.predict_peak(32 * WINDOW)
    assert predicted.peak_bytes == pytest.approx(peak.total_bytes, rel=0.01)
    assert predicted.by_category == pytest.approx(peak.by_category(), rel=0.01)
    assert predicted.phase == peak.phase
    softmax = growth.fit("softmax")
    assert softmax.exponent == pytest.approx(exponent, abs=0.05)


def record_loop(lengths: list[int], path: Path | None = None) -> Run:
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters())
    with attnprof.trace(path) as tracer:
        for n in lengths:
            model(torch.randn(n, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracer.run


def test_growth_comes_from_the_steps_of_a_training_loop() -> None:
    growth = Growth.from_run(record_loop([16, 64, 32, 16, 96, 64]))
    assert growth.source == "steps"
    assert [x.seq_len for x in growth.lengths] == [16, 32, 64, 96]
    fit = growth.fit("softmax")
    assert fit.coefficients["forward"] == pytest.approx((0, 0, 4))
    assert fit.coefficients["backward"] == pytest.approx((0, 0, 2 * 4))
    assert growth.fit("optimizer_state").law == "constant"
    assert growth.find_wall("1 GB").by == "fit"


def test_growth_from_steps_asks_the_run_that_is_there() -> None:
    run = record_loop([16, 32])
    assert Growth.from_run(run).run(32) is run  # another would be attributed anew


def test_growth_from_steps_agrees_with_a_sweep() -> None:
    def make(n: int, device: str) -> Callable[[], None]:
        model = Attention()
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            model(torch.randn(n, WIDTH)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    lengths = [16, 32, 64]
    swept = sweep(make, lengths, steps=2).fit()
    looped = Growth.from_run(record_loop([16, *lengths])).fit()
    assert looped.coefficients["backward"] == pytest.approx(swept.coefficients["backward"])


class Greedy(Attention):
    """Run out of memory at 96 tokens and beyond."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        if len(x) >= 96:
            torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
        return result


def train_greedily(lengths: list[int]) -> None:
    model = Greedy()
    for n in lengths:
        model(torch.randn(n, WIDTH)).sum().backward()


def test_growth_from_steps_says_which_length_had_no_memory() -> None:
    with pytest.raises(RuntimeError, match="allocate"), attnprof.trace() as tracer:
        train_greedily([16, 32, 64, 96])
    growth = Growth.from_run(tracer.run)
    ended = [(x.seq_len, x.status) for x in growth.lengths]
    assert ended == [(32, "completed"), (64, "completed"), (96, "out_of_memory")]
    wall = growth.find_wall()
    assert (wall.seq_len, wall.next_seq_len, wall.by) == (64, 96, "measured")


def test_growth_of_a_decoding_loop_is_that_of_its_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with attnprof.trace() as tracer:
        model.generate(
            torch.randint(2, VOCABULARY, (1, 16)),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    fit = Growth.from_run(tracer.run).fit("kv_cache")
    assert fit.phase == "decode"
    assert fit.law == "linear"
    assert fit.exponent == pytest.approx(1, abs=0.05)


def test_growth_of_runs_recorded_one_by_one(tmp_path: Path) -> None:
    runs = [record_workload(make_step, n, directory=tmp_path / str(n)) for n in (16, 32, 64)]
    growth = Growth.from_runs(runs)
    assert growth.predict(256) == sweep(make_step, [16, 32, 64]).predict(256)
    assert growth.run(32).path == tmp_path / "32"


def test_growth_of_traced_runs_takes_lengths_from_their_steps() -> None:
    runs = [record_loop([n, n]) for n in (16, 32, 64)]
    assert [x.seq_len for x in Growth.from_runs(runs).lengths] == [16, 32, 64]


def test_growth_of_runs_refuses_what_cannot_be_compared() -> None:
    run = record_workload(make_step, 16)
    with pytest.raises(ValueError, match="two runs have length 16"):
        Growth.from_runs([run, record_workload(make_step, 16)])
    with pytest.raises(ValueError, match="no runs were given"):
        Growth.from_runs([])
    with pytest.raises(TypeError, match=r"takes runs, got str; open them with attnprof.load"):
        Growth.from_runs(["runs/gpt2"])  # type: ignore[list-item]  # the mistake
    with pytest.raises(
        ValueError, match=r"no single sequence length; .* 16, 32\. .*from_run\(run\)"
    ):
        Growth.from_runs([record_loop([16, 32])])


def test_growth_of_a_run_without_steps_is_refused() -> None:
    with attnprof.trace() as tracer:
        torch.ones(3).exp()
    with pytest.raises(ValueError, match="no step whose sequence length is known"):
        Growth.from_run(tracer.run)
    with pytest.raises(TypeError, match="takes a run, got str"):
        Growth.from_run("runs/gpt2")  # type: ignore[arg-type]  # the mistake


@pytest.fixture(scope="module")
def growth() -> Growth:
    return sweep(make_inference, [16, 32, 64])


def test_growth_fits_a_layer(growth: Growth) -> None:
    in_layer = growth.fit("parameters", layer="qkv")
    assert in_layer.coefficients["outside"] == pytest.approx((4 * (WIDTH + 1) * 3 * WIDTH, 0, 0))
    assert in_layer.sentence.startswith("parameters in qkv do not grow with n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "sofmax"}, "the growth has no category 'sofmax'; it has: total, parameters"),
        ({"layer": "h.7"}, "the growth has no layer 'h.7'; it has: qkv"),
        ({"source": "dry_run"}, "no completed length whose source is 'dry_run'; it has: measured"),
    ],
)
def test_growth_fit_refuses_what_is_not_there(
    growth: Growth, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        growth.fit(**arguments)


def test_growth_predicts_by_phase(growth: Growth) -> None:
    peak = growth.predict_peak(4096)
    assert peak.peak_bytes == max(peak.by_phase.values()) == sum(peak.by_category.values())
    assert growth.predict(64) == growth.run(64).peak().total_bytes


@pytest.mark.parametrize(
    ("seq_len", "error"),
    [
        (0, ValueError),
        (-5, ValueError),
        (1.5, TypeError),
        (float("nan"), TypeError),
        (True, TypeError),
    ],
)
def test_growth_predict_refuses_bad_lengths(
    growth: Growth, seq_len: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="seq_len must be"):
        growth.predict(seq_len)
    with pytest.raises(error, match="multiple_of must be"):
        growth.max_seq_len("1 GB", multiple_of=seq_len)


def test_growth_without_a_wall_asks_for_a_capacity(growth: Growth) -> None:
    with pytest.raises(ValueError, match=r"no length ran out of memory, .* give a capacity"):
        growth.find_wall()


def test_growth_names_runs_it_does_not_have(growth: Growth) -> None:
    with pytest.raises(ValueError, match="no measured run of length 7; there are: 16, 32, 64"):
        growth.run(7)


def test_growth_of_one_length_has_points_but_no_law() -> None:
    one = sweep(make_step, [16])
    assert not one.points.is_empty()
    for ask in (one.fit, lambda: one.predict(64), lambda: one.max_seq_len("1 GB")):
        with pytest.raises(ValueError, match=r"one length \(16\); a law needs at least two"):
            ask()


def test_growth_of_nothing_completed_says_why() -> None:
    def make(n: int, device: str) -> Callable[[], None]:
        raise MemoryError("none left")

    failed = sweep(make, [16, 32])
    with pytest.raises(ValueError, match=r"no length was completed.*16 \(MemoryError: none left\)"):
        failed.fit()

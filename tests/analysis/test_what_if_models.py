"""Models of transformers: what they need with fused attention, predicted within 2 %."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Case, loss_of, make_t5

import attnprof
from attnprof.run import Run
from tests.versions import needs_fused_groups

BATCH, LENGTH, VOCABULARY, WIDTH, HEADS = 2, 120, 61, 32, 4


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH))


def make_gpt2(attention: str, *, dropout: float = 0.0) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=3, n_head=HEADS,
        attn_pdrop=dropout, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        attn_implementation=attention,
    )  # fmt: skip
    ids = tokens()
    return Case(
        GPT2LMHeadModel(config).train(), {"input_ids": ids, "labels": ids, "use_cache": False}
    )


def make_llama(attention: str, *, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, attn_implementation=attention,
        use_cache=False,
    )  # fmt: skip
    ids = tokens()
    model = LlamaForCausalLM(config).to(dtype).train()
    return Case(model, {"input_ids": ids, "labels": ids})


def make_bert(attention: str) -> Case:
    """Return a BERT whose batch is padded: fused attention is given a mask."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS,
        intermediate_size=56, attn_implementation=attention, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[:, -7:] = 0
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    return Case(BertForMaskedLM(config).train(), inputs)


def make_vit(attention: str) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=56,
        image_size=80, patch_size=8, num_labels=5, attn_implementation=attention,
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(BATCH, 3, 80, 80), "labels": torch.arange(BATCH)}
    return Case(ViTForImageClassification(config).train(), inputs)


def make_half_llama(attention: str) -> Case:
    return make_llama(attention, dtype=torch.bfloat16)


def record(directory: Path, case: Case) -> Run:
    """Return the run of two training steps."""
    optimizer = torch.optim.AdamW(case.model.parameters())
    with attnprof.trace(directory, samples_per_second=0) as tracer:
        for _ in range(2):
            loss_of(case.model(**case.inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return tracer.run


@pytest.mark.parametrize(
    "make",
    [
        make_gpt2,
        make_bert,
        make_vit,
        pytest.param(make_llama, marks=needs_fused_groups),
        pytest.param(make_half_llama, marks=needs_fused_groups),
    ],
)
def test_fused_attention_is_predicted(make: Callable[[str], Case], tmp_path: Path) -> None:
    before = record(tmp_path / "eager", make("eager"))
    measured = record(tmp_path / "sdpa", make("sdpa")).peak()
    predicted = before.what_if("fused_attention")
    assert predicted.after.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)
    assert predicted.saves_bytes > 0.2 * predicted.before.total_bytes


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [make_gpt2, make_half_llama, make_bert])
def test_checkpointing_is_predicted(
    make: Callable[[str], Case], attention: str, tmp_path: Path
) -> None:
    before = record(tmp_path / "kept", make(attention))
    case = make(attention)
    case.model.activation_checkpointing_enable()
    measured = record(tmp_path / "repeated", case).peak()
    predicted = before.what_if("checkpointing")
    assert predicted.after.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)
    assert predicted.saves_bytes > 0.2 * predicted.before.total_bytes


def test_no_dropout_is_predicted(tmp_path: Path) -> None:
    before = record(tmp_path / "dropped", make_gpt2("eager", dropout=0.1))
    measured = record(tmp_path / "kept", make_gpt2("eager")).peak()
    predicted = before.what_if("no_attention_dropout").after
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)


def test_dropout_that_keeps_attention_from_being_fused_goes_with_it(tmp_path: Path) -> None:
    before = record(tmp_path / "dropped", make_gpt2("sdpa", dropout=0.1))
    measured = record(tmp_path / "kept", make_gpt2("sdpa")).peak()
    predicted = before.what_if("no_attention_dropout").after
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)


@needs_fused_groups
def test_grouped_queries_are_predicted(tmp_path: Path) -> None:
    before = record(tmp_path / "all", make_llama("sdpa", kv_heads=4))
    measured = record(tmp_path / "one", make_llama("sdpa", kv_heads=1)).peak()
    predicted = before.what_if(kv_heads=1).after
    assert predicted.total_bytes == pytest.approx(measured.total_bytes, rel=0.02)


def test_a_learned_bias_is_not_fused_on_the_cpu(tmp_path: Path) -> None:
    case = make_t5()
    for module in case.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    case.model.eval()
    with pytest.raises(ValueError, match="a learned bias needs a gradient"):
        record(tmp_path / "t5", case).what_if("fused_attention")

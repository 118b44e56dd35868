"""Why scaled_dot_product_attention took the path it took on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import attnprof

B, H, T, D = 2, 4, 12, 8
FELL_BACK = "scaled_dot_product_attention fell back to math"


class Attention(nn.Module):
    """Calls the function with what it is given, after a projection that makes Q, K and V."""

    def __init__(self, *, mask: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.mask = mask
        self.is_5d = options.pop("is_5d", False)
        self.value_dim = options.pop("value_dim", D)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        v = v[..., : self.value_dim]
        if self.is_5d:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)


def explain(layer: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    layer, x = layer.to(dtype), torch.ones(B, T, H * D, dtype=dtype)
    with attnprof.trace(samples_per_second=0) as tracer:
        layer(x).sum().backward()
    reason: str = tracer.run.layers()["backend_reason"].item()
    return reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": True}, "fused: _scaled_dot_product_flash_attention_for_cpu"),
        ({"dropout_p": 0.1}, f"{FELL_BACK}: dropout on the attention weights"),
        ({"is_5d": True}, f"{FELL_BACK}: the CPU's kernel takes 4 dimensions only, got 5"),
        (
            {"value_dim": 4},
            f"{FELL_BACK}: the CPU's kernel takes one head_dim for Q, K and V only, got 8 and 4",
        ),
        (
            {"mask": nn.Parameter(torch.zeros(T, T))},
            f"{FELL_BACK}: the CPU's kernel computes no gradient of a mask",
        ),
    ],
)
def test_math_on_the_cpu_says_which_rule_spoke_against_the_kernel(
    options: dict[str, Any], reason: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    assert explain(Attention(**options), dtype) == reason


def test_kernel_that_no_rule_speaks_against_was_switched_off() -> None:
    could = f"{FELL_BACK}, though the CPU's kernel could carry it out: it was switched off, as"
    with sdpa_kernel(SDPBackend.MATH):
        assert explain(Attention(is_causal=True)) == f"{could} torch.nn.attention.sdpa_kernel does"
        reason = explain(Attention(mask=torch.zeros(T, T)))
    assert reason.endswith("or the mask needs a gradient")


def test_attention_that_is_written_out_names_its_normaliser() -> None:
    class Written(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    assert explain(Written()) == "written out: products around _softmax"


def test_dry_run_for_a_gpu_explains_itself_by_that_gpus_rules() -> None:
    def make_step(seq_len: int, device: str) -> Any:
        layer = Attention(mask=torch.zeros(seq_len, seq_len, device=device)).to(device)
        x = torch.ones(B, seq_len, H * D, device=device)
        return lambda: layer(x).sum().backward()

    run = attnprof.dry_run(make_step, 16, target="A100")
    assert run.layers()["backend_reason"].to_list() == [
        "fused: _scaled_dot_product_efficient_attention (flash takes no mask)"
    ]

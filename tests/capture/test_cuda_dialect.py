"""A dry run for CUDA makes the tensors that CUDA's kernels make, on a machine without CUDA."""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnprof.capture.dry_run import dry_run
from attnprof.run import Run

B, H, N, D = 2, 4, 64, 16
BF16, FP32, BOOL = 2, 4, 1


def attend(
    seq_len: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_heads: int = H,
    head_dim: int = D,
    mask: Callable[[int], torch.Tensor] | None = None,
    **options: Any,
) -> Callable[[], None]:
    """Return a training step of one attention, whose inputs are leaves."""
    q = torch.zeros(B, H, seq_len, head_dim, dtype=dtype, requires_grad=True)
    k, v = (
        torch.zeros(B, kv_heads, seq_len, head_dim, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    attn_mask = None if mask is None else mask(seq_len)

    def step() -> None:
        functional.scaled_dot_product_attention(q, k, v, attn_mask, **options).sum().backward()
        for leaf in (q, k, v):
            leaf.grad = None

    return step


def run_attention(target: str = "A100 80GB", **options: Any) -> Run:
    return dry_run(lambda n, device: attend(n, **options), N, target=target)


def ops_of(run: Run) -> set[str]:
    return set(run.allocations["op"].cast(pl.String).drop_nulls().unique())


def saved(run: Run, op: str) -> list[int]:
    rows = run.allocations.filter(pl.col("op").cast(pl.String) == f"aten::{op}", pl.col("saved"))
    return sorted(rows["requested_bytes"].to_list())


@pytest.mark.parametrize(
    ("target", "options", "op"),
    [
        ("A100 80GB", {}, "_scaled_dot_product_flash_attention"),
        ("A100 80GB", {"dropout_p": 0.1}, "_scaled_dot_product_flash_attention"),
        (
            "A100 80GB",
            {"kv_heads": 2, "enable_gqa": True},
            "_scaled_dot_product_flash_attention",
        ),
        ("A100 80GB", {"dtype": torch.float32}, "_scaled_dot_product_efficient_attention"),
        ("T4", {"dtype": torch.float16}, "_scaled_dot_product_efficient_attention"),
        ("H200", {}, "_scaled_dot_product_cudnn_attention"),
    ],
)
def test_fused_kernels_save_no_scores(target: str, options: dict[str, Any], op: str) -> None:
    run = run_attention(target, **options)
    assert f"aten::{op}" in ops_of(run)
    assert run.layers()["kind"].to_list() == ["fused"]
    elements = B * H * N
    item = 4 if options.get("dtype") is torch.float32 else 2
    assert {elements * D * item, elements * FP32} <= set(saved(run, op))  # output, log-sum-exp
    assert run.peak().by_category().get("softmax", 0) == 0


def test_math_is_taken_where_no_fused_kernel_can() -> None:
    run = run_attention("T4", kv_heads=2, enable_gqa=True, dtype=torch.float16)
    assert run.layers()["kind"].to_list() == ["materialised"]
    assert any("grouped heads" in line for line in run.info["dry_run"]["assumptions"])


def test_math_with_dropout_keeps_a_bool_mask() -> None:
    run = run_attention(
        "T4", kv_heads=2, enable_gqa=True, dtype=torch.float16, dropout_p=0.1, is_causal=True
    )
    scores = B * H * N * N
    assert saved(run, "native_dropout") == sorted([scores * BOOL, scores * FP32])


def test_bool_mask_becomes_a_float_one() -> None:
    run = run_attention(mask=lambda n: torch.ones(n, n, dtype=torch.bool))
    assert "aten::_scaled_dot_product_efficient_attention" in ops_of(run)
    assert saved(run, "where.self") == [N * N * BF16]


def test_mask_is_padded_for_the_kernel() -> None:
    n = 60
    run = dry_run(
        lambda n, device: attend(n, mask=lambda n: torch.zeros(n, n, dtype=torch.bfloat16)),
        n,
        target="A100 80GB",
    )
    assert saved(run, "constant_pad_nd") == [n * 64 * BF16]


def test_flash_pads_the_head_dimension() -> None:
    run = run_attention(head_dim=12)
    assert saved(run, "constant_pad_nd") == [B * H * N * 16 * BF16] * 3
    assert run.layers()["q_len"].to_list() == [N]


def test_a_backend_that_is_switched_off_is_not_taken() -> None:
    def make_step(seq_len: int, device: str) -> Callable[[], None]:
        step = attend(seq_len)

        def run() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                step()

        return run

    run = dry_run(make_step, N, target="H200")
    assert run.layers()["kind"].to_list() == ["materialised"]


def test_workspace_of_kernels_is_added() -> None:
    run = run_attention(head_dim=64)
    own = run.allocations.filter(pl.col("category").cast(pl.String) == "workspace")
    assert not own["exact"].any()
    sizes = dict(own.group_by(pl.col("op").cast(pl.String)).agg("requested_bytes").iter_rows())
    rows = B * H * 128  # queries are rounded up to 128
    # Q lies as (B, H, Tq, D), so the output and its gradient are copied: (B, Tq, H, D).
    assert sorted(sizes["aten::_scaled_dot_product_flash_attention_backward"]) == sorted(
        [rows * FP32, rows * 64 * FP32, B * H * N * 64 * BF16, B * H * N * 64 * BF16]
    )
    peak = run.peak()
    assert sum(peak.by_category().values()) == peak.total_bytes
    assert peak.by_category()["workspace"] >= rows * 64 * FP32


def test_cublas_keeps_a_workspace_per_thread() -> None:
    def count(target: str) -> dict[str, int]:
        run = dry_run(make_dropout, 4, target=target)
        return run.peak().by_category()

    assert count("A100 80GB")["workspace"] == 2 * 8_519_680
    assert count("H200")["workspace"] == 2 * 32 * 2**20
    assert "workspace" not in count("cpu")


def make_dropout(seq_len: int, device: str) -> Callable[[], None]:
    layer = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1))
    x = torch.zeros(seq_len, 16)

    def step() -> None:
        layer(x).sum().backward()
        layer.zero_grad()

    return step


def test_dropout_keeps_a_bool_mask() -> None:
    assert N * 16 * BOOL in saved(dry_run(make_dropout, N, target="cuda"), "native_dropout")
    assert "aten::native_dropout" not in ops_of(dry_run(make_dropout, N))


def test_no_mask_where_nothing_is_dropped() -> None:
    def make_step(seq_len: int, device: str) -> Callable[[], None]:
        x = torch.zeros(seq_len, 16)
        return lambda: [functional.dropout(x, 0.1, training=False), functional.dropout(x, 0.0)]

    assert "aten::native_dropout" not in ops_of(dry_run(make_step, N, target="cuda"))


def make_adamw(seq_len: int, device: str) -> Callable[[], None]:
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(5))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.zeros(seq_len, 64)

    def step() -> None:
        sum(layer(x).sum() for layer in model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_optimizers_take_all_parameters_at_once() -> None:
    size = 64 * 64 * FP32
    on_cuda = dry_run(make_adamw, 4, target="cuda").peak(phase="optimizer").by_category()
    on_cpu = dry_run(make_adamw, 4).peak(phase="optimizer").by_category()
    assert on_cuda["temporaries"] >= 5 * size > on_cpu["temporaries"] >= size


def test_blocks_are_multiples_of_512_bytes_on_the_device() -> None:
    run = dry_run(make_adamw, 3, target="cuda")
    own = run.allocations
    assert own["device"].cast(pl.String).unique().to_list() == ["cuda:0"]
    assert (own["size_bytes"] % 512 == 0).all()
    assert (own["size_bytes"] - own["requested_bytes"]).is_between(0, 511).all()
    assert own.filter(pl.col("requested_bytes") == 4).height > 0  # the losses


def test_reserved_bytes_are_simulated() -> None:
    run = dry_run(make_adamw, 3, target="cuda")
    reserved = run.steps["reserved_bytes"].to_list()
    assert len(reserved) == 2
    assert max(reserved) == run.simulate_allocator().reserved_peak_bytes
    assert all(r >= p for r, p in zip(reserved, run.steps["peak_bytes"], strict=True))
    assert dry_run(make_adamw, 3).steps["reserved_bytes"].to_list() == [None, None]


def test_capacity_of_the_simulated_allocator_is_given_as_elsewhere() -> None:
    run = dry_run(make_adamw, 3, target="cuda")
    for enough in ("80 GB", "H200", 80 * 10**9, np.int64(80 * 10**9)):
        assert run.simulate_allocator(capacity_bytes=enough).out_of_memory is None
    assert run.simulate_allocator(capacity_bytes="4 KiB").out_of_memory is not None
    with pytest.raises(ValueError, match="cannot read '80 parsecs' as a size"):
        run.simulate_allocator(capacity_bytes="80 parsecs")


def test_target_is_written_down() -> None:
    about = dry_run(make_dropout, 8, target="h200").info["dry_run"]
    assert about == {
        "target": "cuda",
        "device": "H200",
        "compute_capability": [9, 0],
        "assumptions": [],
        "tables": [],
    }
    (line,) = dry_run(make_dropout, 8, target="cuda").info["dry_run"]["assumptions"]
    assert line.startswith("kernels were chosen as on compute capability 9.0")


def test_autocast_is_said_to_be_the_cpus() -> None:
    def make_step(seq_len: int, device: str) -> Callable[[], None]:
        step = attend(seq_len)

        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                step()

        return run

    lines = dry_run(make_step, 8, target="H200").info["dry_run"]["assumptions"]
    assert any(line.startswith("autocast followed the CPU's list") for line in lines)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("H2000", "no device named 'H2000'; did you mean H200"),
        ("MI300X", "no dry run for MI300X: its kernels are not CUDA's"),
    ],
)
def test_unknown_targets_are_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(make_dropout, 8, target=target)

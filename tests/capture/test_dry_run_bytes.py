"""A dry run takes the bytes that the real program takes, op by op, also where torch's fakes err."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from attnprof.capture import fake_kernels
from attnprof.capture.dry_run import dry_run
from attnprof.capture.workload import record_workload
from attnprof.errors import DryRunError

Step = Callable[[], Any]
MakeStep = Callable[[int, str], Step]
N = 24

TABLE = torch.arange(600, dtype=torch.float32).reshape(60, 10)


def check_same(make_step: MakeStep, seq_len: int = N) -> None:
    """Compare the peak, and what was allocated by which op."""
    real, dry = record_workload(make_step, seq_len), dry_run(make_step, seq_len)
    columns = ["size_bytes", "op", "phase", "category"]
    tables = [run.allocations.select(columns).sort(columns).rows() for run in (dry, real)]
    assert tables[0] == tables[1]
    assert dry.peak().total_bytes == real.peak().total_bytes


def use_slices(seq_len: int, device: str) -> Step:
    model = nn.Linear(10, 10)

    def step() -> None:
        for _ in range(3):
            (model(TABLE[:seq_len]) * TABLE[:seq_len]).sum().backward()

    return step


def use_buffer(seq_len: int, device: str) -> Step:
    model = nn.Linear(10, 10)
    model.register_buffer("table", TABLE[:seq_len])
    return lambda: [(model(model.table) + model.table).sum().backward() for _ in range(2)]


def use_arrays(seq_len: int, device: str) -> Step:
    array = TABLE.numpy()
    model = nn.Linear(10, 10)
    return lambda: [model(torch.from_numpy(array[i : i + 9])).sum().backward() for i in range(3)]


@pytest.mark.parametrize("make_step", [use_slices, use_buffer, use_arrays])
def test_real_tensors_count_once(make_step: MakeStep) -> None:
    check_same(make_step)


def use_arrays_of_results(seq_len: int, device: str) -> Step:
    model = nn.Linear(10, 10)

    def step() -> None:
        kept = [model(torch.ones(seq_len, 10)).detach().numpy() for _ in range(3)]
        assert torch.from_numpy(kept[0] * 0).sum() == 0

    return step


def test_arrays_hold_the_memory_of_their_tensors() -> None:
    check_same(use_arrays_of_results)


def test_arrays_have_the_values_that_are_known() -> None:
    known = TABLE.clone()

    def make_step(seq_len: int, device: str) -> Step:
        assert known.numpy()[1, 2] == 12
        assert torch.arange(5).numpy().tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(RuntimeError, match="requires grad"):
            nn.Linear(2, 2).weight.numpy()
        with pytest.raises(DryRunError, match="value of a int64 tensor at"):
            nn.Linear(2, 2).weight.argmax().numpy()
        return lambda: torch.randn(seq_len, seq_len).numpy().tolist()

    run = dry_run(make_step, 64)
    assert "read as 1.0 at" in run.info["dry_run"]["assumptions"][0]


def test_real_tensors_stay_as_they_are_when_a_dry_run_writes_into_them() -> None:
    outside = torch.zeros(8)

    def make_step(seq_len: int, device: str) -> Step:
        def step() -> None:
            outside.add_(1)
            assert outside.sum().item() == 8

        return step

    dry_run(make_step, N, steps=1)
    assert outside.sum() == 0


def train_with(use: Callable[[torch.Tensor, torch.Tensor], Any]) -> MakeStep:
    """Return a workload whose loss is made by ``use(outputs (2, n, 16), ids (2, n))``."""

    def make_step(seq_len: int, device: str) -> Step:
        model = nn.Linear(16, 16)
        inputs, ids = torch.randn(2, seq_len, 16), torch.arange(2 * seq_len).view(2, -1) % 16

        def step() -> None:
            use(model(inputs), ids).sum().backward()

        return step

    return make_step


def turn(x: torch.Tensor) -> torch.Tensor:
    """Return (2, 16, n), with the dimensions in memory as they are."""
    return x.transpose(1, 2)


def pick_bags(x: torch.Tensor, mode: str, **options: Any) -> torch.Tensor:
    return functional.embedding_bag(
        torch.arange(N), x[0], torch.tensor([0, 5, N]), mode=mode, **options
    )


KERNELS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "mse": lambda x, ids: functional.mse_loss(x, torch.zeros_like(x)),
    "mse turned": lambda x, ids: functional.mse_loss(turn(x), turn(x).detach(), reduction="none"),
    "smooth_l1": lambda x, ids: functional.smooth_l1_loss(turn(x), torch.zeros(2, 16, N)),
    "huber turned": lambda x, ids: functional.huber_loss(turn(x), torch.zeros(2, 16, N)),
    "bce": lambda x, ids: functional.binary_cross_entropy(x.sigmoid(), torch.zeros_like(x)),
    "soft_margin": lambda x, ids: functional.soft_margin_loss(x, torch.ones_like(x)),
    "kl turned": lambda x, ids: functional.kl_div(
        turn(x.log_softmax(-1)), torch.ones(2, 16, N), reduction="none"
    ),
    "ctc": lambda x, ids: functional.ctc_loss(
        x.log_softmax(-1).transpose(0, 1),
        ids[:, :5].clamp(1),
        torch.tensor([N, N - 1]),
        torch.tensor([5, 3]),
    ),
    "batch norm turned": lambda x, ids: functional.batch_norm(
        turn(x), None, None, training=True
    ).square(),
    "bags": lambda x, ids: pick_bags(x, "mean"),
    "bags with an end": lambda x, ids: pick_bags(x, "max", include_last_offset=True),
    "patches": lambda x, ids: functional.fold(
        functional.unfold(x[:, None], 3, padding=1), (N, 16), 3, padding=1
    ),
    "window": lambda x, ids: x[0] * torch.hann_window(16),
    "one_hot": lambda x, ids: x * functional.one_hot(ids, 16),
    "one_hot of all": lambda x, ids: x * functional.one_hot(ids),
    "masked_select": lambda x, ids: x.masked_select((ids > 3)[..., None]).square(),
    "mask as index": lambda x, ids: functional.cross_entropy(x[ids > 3], ids[ids > 3]),
    "mask and number": lambda x, ids: x[:, ids[0] > 3, 2].square(),
    "complex": lambda x, ids: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.polar(torch.ones(8), torch.ones(8))
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_results_have_the_bytes_of_the_kernel(name: str) -> None:
    check_same(train_with(KERNELS[name]))


def test_compiled_code_runs_as_it_is_written() -> None:
    def make(options: dict[str, Any] | None) -> MakeStep:
        def make_step(seq_len: int, device: str) -> Step:
            model: Any = nn.Sequential(nn.Linear(16, 16), nn.GELU())
            if options is not None:
                model = torch.compile(model, **options)
            return lambda: model(torch.ones(seq_len, 16)).sum().backward()

        return make_step

    plain, compiled = (dry_run(make(options), N) for options in (None, {"fullgraph": True}))
    assert compiled.peak().by_category() == plain.peak().by_category()
    assert not compiled.has_compiled_code
    assert plain.info["dry_run"]["assumptions"] == []
    assert compiled.info["dry_run"]["assumptions"] == [
        "what torch.compile compiles was run as it is written"
    ]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    def make_step(seq_len: int, device: str) -> Step:
        parts = [torch.ones(seq_len), torch.ones(3)]
        return lambda: torch.nested.nested_tensor(parts, layout=layout)

    with pytest.raises(DryRunError, match=r"^a nested tensor is made at .*test_dry_run_bytes.py:"):
        dry_run(make_step, N)


def test_sparse_copies_are_refused() -> None:
    with pytest.raises(DryRunError, match=r"as many values as are not zero, at .*_bytes.py:"):
        dry_run(lambda seq_len, device: lambda: torch.ones(seq_len, 2).to_sparse(), N)


@pytest.mark.parametrize("is_padded", [False, True])
def test_layers_that_run_as_one_op_have_the_bytes_of_their_kernel(is_padded: bool) -> None:
    def use_encoder(seq_len: int, device: str) -> Step:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).to(device).eval()
        inputs = torch.randn(2, seq_len, 16, device=device)
        mask = torch.zeros(2, seq_len, dtype=torch.bool, device=device) if is_padded else None
        return torch.no_grad()(lambda: layer(inputs, src_key_padding_mask=mask))

    check_same(use_encoder)


@pytest.mark.parametrize("is_training", [False, True])
def test_lstm_keeps_what_its_kernel_keeps(is_training: bool) -> None:
    def use_lstm(seq_len: int, device: str) -> Step:
        model = nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True).to(device)
        inputs = torch.randn(2, seq_len, 8, device=device)
        if is_training:
            return lambda: model(inputs)[0].sum().backward()
        return torch.no_grad()(lambda: model.eval()(inputs))

    for seq_len, error in ((N, 0.0), (1000, 0.01)):
        runs = (run(use_lstm, seq_len) for run in (record_workload, dry_run))
        real, dry = (run.peak().total_bytes for run in runs)
        assert dry == pytest.approx(real, rel=error)


def test_ops_without_a_fake_kernel_take_no_real_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def use_softmax(seq_len: int, device: str) -> Step:
        scores = torch.randn(1, 1, seq_len, 8, device=device)
        mask = torch.zeros(1, 1, seq_len, 8, dtype=torch.bool, device=device)
        return lambda: torch.ops.aten._masked_softmax(scores, mask, 3, 2)

    check_same(use_softmax)
    monkeypatch.delitem(fake_kernels._KERNELS, torch.ops.aten._masked_softmax.default)
    check_same(use_softmax)
    message = r"aten::_masked_softmax .* would need 40.00 GiB of real memory"
    with pytest.raises(DryRunError, match=message):
        dry_run(use_softmax, 2**30)

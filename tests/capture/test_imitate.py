"""What autograd does in place if nobody watches: which nodes that is known of, and is it so?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from attnprof.capture.imitate import NODES_WITHOUT_ADDITIONS, InPlaceForms

ZERO = torch.tensor([0])
INDEX = torch.zeros(6, 6, dtype=torch.long)

# Each makes nodes whose backward is run with one gradient only, so that every addition there is
# the node's own.
PROGRAMS: list[Callable[[Tensor], Any]] = [
    lambda y: y.view(-1),
    lambda y: torch.ops.aten._unsafe_view(y, [36]),
    lambda y: torch.ops.aten._reshape_alias(y, [36], [1]),
    torch.ops.aten.alias,
    lambda y: y.t().reshape(-1),
    lambda y: y.transpose(0, 1).permute(1, 0),
    lambda y: y[None].expand(3, 6, 6),
    lambda y: y[0],
    lambda y: y[:, 2:4].squeeze(0),
    lambda y: y.unsqueeze(0).squeeze(),
    lambda y: y.unbind(0)[1],
    lambda y: y.split(4)[1],
    lambda y: y.split([2, 4])[1],
    lambda y: y.diagonal(),
    lambda y: y.unfold(1, 3, 2),
    lambda y: y * y.detach(),
    lambda y: y + 1,
    lambda y: 1 - y,
    lambda y: y - y.detach(),
    lambda y: y / y.detach(),
    lambda y: -y,
    torch.exp,
    torch.exp2,
    torch.log,
    torch.tanh,
    torch.sigmoid,
    functional.silu,
    functional.gelu,
    torch.relu,
    functional.leaky_relu,
    functional.softplus,
    torch.sqrt,
    torch.rsqrt,
    lambda y: y**3,
    lambda y: y.detach() ** y,
    torch.reciprocal,
    torch.sin,
    torch.cos,
    torch.abs,
    torch.erf,
    lambda y: y.clamp(0.1, 2.0),
    lambda y: torch.maximum(y, y.detach().roll(1)),
    lambda y: torch.minimum(y, y.detach().roll(1)),
    lambda y: torch.lerp(y, y.detach(), 0.3),
    lambda y: torch.lerp(y, y.detach(), y.detach()),
    lambda y: torch.addcmul(y.detach(), y, y.detach()),
    lambda y: torch.addcdiv(y.detach(), y.detach(), y),
    lambda y: y.to(torch.float64),
    torch.clone,
    lambda y: y.masked_fill(y > 1, 0.0),
    lambda y: torch.where(y > 1, y, 0.0),
    torch.tril,
    torch.triu,
    lambda y: functional.dropout(y, 0.5),
    lambda y: y.sum(1),
    lambda y: y.mean(1),
    lambda y: y.mean(),
    lambda y: y.cumsum(1),
    lambda y: y.logsumexp(1),
    lambda y: y @ y.detach(),
    lambda y: torch.bmm(y[None], y[None].detach()),
    lambda y: functional.linear(y, y.detach(), y.detach()[0]),
    lambda y: torch.baddbmm(y[None].detach(), y[None], y[None].detach()),
    lambda y: functional.conv1d(y[None], torch.ones(2, 6, 3)),
    lambda y: y.softmax(1),
    lambda y: y.log_softmax(1),
    lambda y: torch._safe_softmax(y, 1),
    lambda y: functional.layer_norm(y, (6,)),
    lambda y: functional.group_norm(y[None], 2),
    lambda y: functional.nll_loss(y, INDEX[0]),
    lambda y: functional.scaled_dot_product_attention(
        y[None, None], y[None, None].detach(), y[None, None].detach()
    ),
    lambda y: functional.embedding(ZERO, y),
    lambda y: torch.cat([y, y.detach()]),
    lambda y: torch.stack([y, y.detach()]),
    lambda y: y[INDEX[0]],
    lambda y: y.index_select(0, ZERO),
    lambda y: y.index_add(0, ZERO, y[:1].detach()),
    lambda y: y.gather(0, INDEX),
    lambda y: y.scatter(0, INDEX, y.detach()),
    lambda y: y.scatter(0, INDEX, 0.0),
    lambda y: y.scatter_add(0, INDEX, y.detach()),
    lambda y: y.repeat(2, 1),
    lambda y: y.flip(0),
    lambda y: y.roll(1),
    lambda y: y.topk(2)[0],
    lambda y: y.sort()[0],
    lambda y: torch.sort(y, stable=True)[0],
    lambda y: functional.pad(y, (1, 1)),
    lambda y: y.max(0)[0],
    lambda y: y.min(0)[0],
    lambda y: y.median(0)[0],
    lambda y: y.nanmedian(0)[0],
    lambda y: y.mode(0)[0],
    lambda y: y.kthvalue(2)[0],
    lambda y: y.cummax(0)[0],
    lambda y: y.cummin(0)[0],
    lambda y: y.take(ZERO),
    lambda y: y.masked_select(y > 1),
]


class Listener(TorchDispatchMode):
    """Notes which ops run under which node."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[tuple[str, str]] = set()
        self.nodes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node = torch._C._current_autograd_node()
        if node is not None:
            self.heard.add((type(node).__name__, func.overloadpacket.__name__))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def listener() -> Listener:
    """Return what was heard in the backward passes of all programs."""
    listener = Listener()
    for program in PROGRAMS:
        x = torch.rand(6, 6).add_(0.5).requires_grad_()
        with listener:
            result = program(x)
            node = result.grad_fn
            while node is not None:
                listener.nodes.add(type(node).__name__)
                node = next((n for n, _ in node.next_functions if n is not None), None)
            result.backward(torch.ones_like(result))
    return listener


def test_imitated_nodes_add_nothing_themselves(listener: Listener) -> None:
    own = {node for node, op in listener.heard if op == "add"}
    assert not own & NODES_WITHOUT_ADDITIONS


def test_imitated_nodes_are_all_tried_here(listener: Listener) -> None:
    """A name that torch does not use, or a node nobody looked at, has no place in the list."""
    stems = {name.split("Backward")[0] for name in NODES_WITHOUT_ADDITIONS}
    tried = {node.split("Backward")[0] for node in listener.nodes}
    on_cuda_only = {
        "NativeDropout",
        "ScaledDotProductFlashAttention",
        "ScaledDotProductEfficientAttention",
        "ScaledDotProductCudnnAttention",
    }
    assert stems - tried - on_cuda_only == set()


def test_imitation_learns_the_same_everywhere() -> None:
    """What it learns of owners decides over every gradient, so nothing around may change it."""
    expected = InPlaceForms()._sole_owner
    assert expected is not None
    for around in (torch.inference_mode(), torch.no_grad(), torch.device("meta"), Listener()):
        with around:
            assert InPlaceForms()._sole_owner == expected

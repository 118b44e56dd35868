"""Workloads to sweep, in a module of their own so that other processes can import them."""

import os
import signal
from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 8
TOO_MANY_BYTES = 2**50


class Attention(nn.Module):
    """One head, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (n, WIDTH) -> (n, WIDTH)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.T).softmax(-1) @ v


def make_step(n: int, device: str) -> Callable[[], None]:
    model = Attention().to(device)
    x = torch.randn(n, WIDTH, device=device)

    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    return step


def make_inference(n: int, device: str) -> Callable[[], None]:
    model = Attention().to(device)
    x = torch.randn(n, WIDTH, device=device)

    @torch.no_grad()
    def step() -> None:
        model(x)

    return step


def make_greedy(n: int, device: str) -> Callable[[], None]:
    """Run out of memory at 32 tokens and beyond, halfway through a step."""
    step = make_step(n, device)

    def greedy() -> None:
        step()
        if n >= 32:
            torch.empty(TOO_MANY_BYTES, dtype=torch.uint8, device=device)

    return greedy


def make_positioned(n: int, device: str) -> Callable[[], None]:
    """Take no more than 32 tokens: a table of their positions ends there."""
    table = nn.Embedding(32, WIDTH, device=device)
    model = Attention().to(device)
    positions = torch.arange(n, device=device)

    def step() -> None:
        model(table(positions)).sum().backward()
        model.zero_grad()
        table.zero_grad()

    return step


def make_windowed(n: int, device: str) -> Callable[[], None]:
    if n % 16:
        raise ValueError(f"{n} is not a whole number of windows of 16")
    return make_step(n, device)


def make_unpredictable(n: int, device: str) -> Callable[[], None]:
    """Make a tensor whose shape depends on values, which a dry run does not have."""
    model = Attention().to(device)
    x = torch.randn(n, WIDTH, device=device)

    def step() -> None:
        result = model(x)
        result[result.sum(-1) > 0].sum().backward()

    return step


def make_recurrent(n: int, device: str) -> Callable[[], None]:
    """Loop over tokens, so that longer sequences run more ops."""
    cell = nn.Linear(WIDTH, WIDTH).to(device)
    x = torch.randn(n, WIDTH, device=device)

    def step() -> None:
        state = torch.zeros(WIDTH, device=device)
        for token in x:
            state = torch.tanh(cell(state) + token)
        state.sum().backward()

    return step


def make_looked_up(n: int, device: str) -> Callable[[], None]:
    """Look positions up in a table of 64 rows."""
    positions = nn.Embedding(64, WIDTH).to(device)
    return lambda: positions(torch.arange(n, device=device)).sum().backward()


ENDINGS: dict[int, Callable[[], object]] = {
    24: lambda: os.kill(os.getpid(), signal.SIGKILL),
    32: lambda: os.kill(os.getpid(), signal.SIGSEGV),
    40: lambda: torch.empty(TOO_MANY_BYTES, dtype=torch.uint8),
    48: lambda: [][1],
}


def make_doomed(n: int, device: str) -> Callable[[], None]:
    """End in many ways, depending on the length."""
    step = make_step(n, device)

    def end() -> None:
        step()
        ENDINGS.get(n, lambda: None)()

    return end


def make_interruptible(seq_len: int, device: str) -> Callable[[], object]:
    """Fail where an interrupt would be held back: only the start of a process is spared one."""
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return lambda: torch.ones(seq_len, device=device)

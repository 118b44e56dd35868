"""What ``attnprof doctor`` runs: which devices torch has, and a training step of two layers."""

import torch
from torch import nn


def describe_cuda() -> tuple[bool, str]:
    """Return whether torch can use a GPU, and which one or why not."""
    if torch.version.cuda is None and torch.version.hip is None:
        return False, "this build of torch is for the CPU only"
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        return False, f"torch is built for {built_for} but sees no usable GPU (driver?)"
    names = [
        f"cuda:{number} {torch.cuda.get_device_name(number)}"
        for number in range(torch.cuda.device_count())
    ]
    return True, f"CUDA {torch.version.cuda}: " + ", ".join(names)


class Attention(nn.Module):
    """Attention written out, so that scores and softmax are there to be seen."""

    def __init__(self, width: int) -> None:
        """Make one layer of ``width`` features and a single head."""
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within ``x``, of shape (B, n, width)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, n, n)
        result: torch.Tensor = self.out(scores.softmax(-1) @ v)
        return x + result


def step() -> None:
    """Train two layers for one step."""
    model = nn.Sequential(Attention(32), Attention(32))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64, 32)).square().mean().backward()
    optimizer.step()

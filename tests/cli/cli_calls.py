"""Call the command line as a user does, in a process of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

TRAINING = """\
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + (q @ k.transpose(-1, -2)).softmax(-1) @ v

model = nn.Sequential(Attention(), Attention())
optimizer = torch.optim.SGD(model.parameters())
for _ in range(3):
    model(torch.randn(2, 64, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained")
"""


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str


def make_environment() -> dict[str, str]:
    """Return the environment in which attnprof is found, and nothing colours its output."""
    coloured = ("FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS")
    environment = {name: value for name, value in os.environ.items() if name not in coloured}
    return environment | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def call(*arguments: str, cwd: Path) -> Ended:
    """Run ``python -m attnprof`` with arguments."""
    ended = subprocess.run(
        [sys.executable, "-m", "attnprof", *arguments],
        cwd=cwd,
        env=make_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)

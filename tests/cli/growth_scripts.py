"""Scripts that ``attnprof sweep`` and ``attnprof predict`` are pointed at."""

WORKLOAD = """\
import torch
from torch import nn

print("imported")

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + (q @ k.transpose(-1, -2)).softmax(-1) @ v

def make_step(seq_len, device):
    model = nn.Sequential(Attention(), Attention()).to(device)
    x = torch.randn(2, seq_len, 32, device=device)

    def step():
        model(x).sum().backward()
        model.zero_grad()

    return step

def make_limited_step(seq_len, device):
    if seq_len == 64:
        raise torch.OutOfMemoryError("no memory for 64")
    if seq_len > 64:
        raise IndexError(f"{seq_len} tokens do not fit the model")
    return make_step(seq_len, device)

def make_slow_step(seq_len, device):
    import os, time
    if seq_len > 32 and not os.path.exists("quick"):
        print("slow", flush=True)
        time.sleep(60)
    return make_step(seq_len, device)

def make_dictated_step(seq_len, device):
    return {"model": None}

def make_failing_step(seq_len, device):
    raise LookupError("boom")

def make_asking_step(seq_len, device):
    x = torch.randn(seq_len, device=device)
    return lambda: x[x > 0]

def make_nothing(seq_len):
    pass

LENGTHS = [1, 2, 3]

class Makers:
    step = staticmethod(make_step)
"""

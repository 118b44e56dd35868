"""What every test runs under: few threads, no network, the same random numbers each time."""

import os
import random
import sys

import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]

# Before anything imports torch, which reads them once. Two threads, because tests run side by
# side; offline, because a model comes from its configuration and never from a hub.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# No deadline: on a busy machine one slow example says nothing about the code. The same
# examples each time, so that a failure is found by whoever caused it.
settings.register_profile("attnprof", deadline=None, derandomize=True)
settings.load_profile("attnprof")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start each test from the same random state, without importing torch for those that do not."""
    random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where there is no CUDA device."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")

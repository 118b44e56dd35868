"""Whether this process can be forked with torch in it, and what the child has to leave alone."""

import sys
import threading

import torch


def can_fork() -> bool:
    """Return whether a child forked now can go on using torch, on the CPU.

    Not with another Python thread alive, whose locks would never be released in the child, nor
    once CUDA is in use, which cannot be forked. Threads of libraries are those of `enter_child`.
    """
    is_linux = sys.platform == "linux"  # elsewhere the system's own libraries do not survive it
    uses_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # not annotated
    return is_linux and threading.active_count() == 1 and not uses_cuda


def enter_child() -> None:
    """Keep a forked child to one thread: the pool that its parent had is not there any more.

    What waits for OpenMP's pool would wait for ever. torch's own data loaders do the same.
    """
    torch.set_num_threads(1)

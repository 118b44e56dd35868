"""What an exception says about how a traced program ended."""

import os
from pathlib import Path
from types import TracebackType

import torch

from attnprof.vocabulary import Status

_OWN_FILES = str(Path(__file__).parent) + os.sep


def text_of(error: BaseException) -> str:
    """Return an exception's message, if it can say one."""
    try:
        return str(error)[:2000]
    except Exception as broken:
        return f"(its message cannot be had: {type(broken).__name__})"


_SIGNS_OF_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "BLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def status_of(error: BaseException | None) -> Status:
    """Return how a program ended that raised ``error``, or nothing."""
    if error is None or isinstance(error, GeneratorExit):
        return Status.COMPLETED
    if isinstance(error, SystemExit):
        return Status.COMPLETED if error.code in (None, 0) else Status.FAILED
    if isinstance(error, KeyboardInterrupt):
        return Status.INTERRUPTED
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Status.OUT_OF_MEMORY
    # The CPU allocator, the driver and CUDA's libraries have no exception of their own.
    text = text_of(error) if isinstance(error, RuntimeError) else ""
    if any(sign in text for sign in _SIGNS_OF_NO_MEMORY):
        return Status.OUT_OF_MEMORY
    return Status.FAILED


def without_own_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Return the traceback without the frames of the tracer's handlers."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename.startswith(_OWN_FILES):
        traceback = traceback.tb_next
    frame = traceback
    while frame is not None:
        following = frame.tb_next
        while following is not None and following.tb_frame.f_code.co_filename.startswith(
            _OWN_FILES
        ):
            following = following.tb_next
        frame.tb_next = following
        frame = following
    return traceback

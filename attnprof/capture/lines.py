"""Which line of the traced program is running, or failed."""

import os
import sys
import traceback
from types import FrameType

import torch

_LIBRARY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
"""Where torch and this package lie: what runs there is not the program."""


def find_line() -> str:
    """Return the innermost line that runs outside of torch and attnprof, as ``file:line``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown line"


def is_under(file: str) -> bool:
    """Return whether code of ``file`` runs between the program's line and here."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back
    return False


def find_origin(error: BaseException) -> str:
    """Return the innermost line outside of torch and attnprof that an exception passed."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_LIBRARY)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown line"

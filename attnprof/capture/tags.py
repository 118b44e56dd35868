"""What only the program knows of its memory: `tag`."""

import torch

from attnprof.capture import tracer as tracing
from attnprof.capture.ledger import plain_tensors
from attnprof.vocabulary import Category, Role


def tag(tensor: torch.Tensor, category: str | Category, *, layer: str = "") -> torch.Tensor:
    """Say what a tensor's memory is for, where data flow cannot know it; return the tensor.

    Does nothing when no trace is running, so it can stay in the code of an engine that owns its
    memory. Does nothing in compiled code either, nor in steps that are only counted.

    Args:
        tensor: The tensor whose whole storage is meant.
        category: A `Category` or its text, such as ``"kv_cache"``.
        layer: The layer it belongs to, as a module path.

    Raises:
        ValueError: The category is unknown.
        TypeError: ``tensor`` is not a tensor, or ``layer`` not text.
    """
    try:
        category = Category(category)
    except ValueError:
        raise ValueError(
            f"unknown category {category!r}; expected one of {', '.join(Category)}"
        ) from None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"attnprof.tag() takes a tensor, got {type(tensor).__name__}")
    if not isinstance(layer, str):
        raise TypeError(
            f"attnprof.tag() got layer={layer!r}; expected a module path, such as 'layers.3'"
        )
    if torch.compiler.is_compiling():
        return tensor
    tracer = tracing._active
    if tracer is not None and tracer.is_recording and tracer._recorder is not None:
        op = tracer._recorder.count_ops()
        for plain in plain_tensors(tensor):
            storage = tracer.ledger.find(plain)
            if storage >= 0:
                tracer._recorder.identities.append(
                    (storage, Role.TAGGED.value, "", -1, -1, op, category.value, layer)
                )
    return tensor

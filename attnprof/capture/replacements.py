"""Functions of ours in the place of torch's own, for the time being."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING = object()


@contextmanager
def replacing(owner: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of a class or module, and put back what it had of its own before.

    What the program has set or wrapped meanwhile stays as it is: a wrapper may still call ours,
    which then should only pass on.

    Args:
        owner: The class or module.
        replacements: Per name, what is found there for the time being.
    """
    before = {name: vars(owner).get(name, _NOTHING) for name in replacements}
    for name, ours in replacements.items():
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for name, own in before.items():
            if vars(owner).get(name) is not replacements[name]:
                continue
            if own is _NOTHING:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, own)

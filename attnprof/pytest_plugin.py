"""The pytest plugin: the ``attnprof_trace`` fixture.

Loaded by every pytest run of an environment that has attnprof installed, so it imports nothing
heavy before a test asks for it.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from attnprof.capture.tracer import Tracer


@pytest.fixture
def attnprof_trace(tmp_path: Path) -> "Callable[[], Tracer]":
    """Trace a part of a test; the run is kept in the test's temporary directory.

    ::

        def test_step(attnprof_trace):
            with attnprof_trace() as tracer:
                step()
            assert tracer.run.peak().by_category().get("softmax", 0) < 2**20
    """
    numbers = count()

    def begin() -> "Tracer":
        from attnprof.capture.tracer import trace

        return trace(tmp_path / f"attnprof-{next(numbers)}", samples_per_second=0)

    return begin

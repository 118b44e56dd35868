"""The report in a notebook: the page, in a frame that keeps it apart."""

import re
from html import unescape

import pytest

from attnprof.report.notebook import show
from attnprof.run import Run
from attnprof.units import format_bytes


def test_frame_holds_the_page(real_run: Run) -> None:
    view = show(real_run)
    frame = view._repr_html_()
    inside = re.search(r'srcdoc="([^"]*)"', frame)
    assert inside is not None
    assert unescape(inside[1]) == view.page
    assert format_bytes(real_run.peak().total_bytes) in view.page


def test_names_of_layers_stay_in_the_frame(hostile_run: Run) -> None:
    frame = show(hostile_run)._repr_html_()
    assert "<script" not in frame
    assert "allow-same-origin" not in frame


def test_unknown_step_is_an_error(real_run: Run) -> None:
    with pytest.raises(ValueError, match="no step 99"):
        show(real_run, step=99)

"""A run's report in a notebook: the page of ``attnprof report --html``, in a frame."""

from html import escape

from attnprof.report.html import render_html
from attnprof.report.summary import summarise
from attnprof.run import Run


class ReportView:
    """A report that a notebook shows where this object is a cell's result."""

    def __init__(self, page: str, *, height: int) -> None:
        """Wrap a page.

        Args:
            page: HTML that needs no network.
            height: Of the frame, in pixels.
        """
        self.page = page
        """The page; write it to a file to keep it."""
        self._height = height

    def __repr__(self) -> str:
        return f"ReportView({len(self.page):,} characters of HTML)"

    def _repr_html_(self) -> str:
        """Return the page in a frame of its own: its styles stay off the notebook's."""
        # Without its origin, what a run calls its layers reaches nothing of the notebook.
        return (
            f'<iframe srcdoc="{escape(self.page, quote=True)}" width="100%" '
            f'height="{self._height}" sandbox="allow-scripts" '
            'style="border:1px solid #8888; border-radius:8px" title="attnprof report"></iframe>'
        )


def show(
    run: Run, *, step: int | None = None, device: str | None = None, height: int = 800
) -> ReportView:
    """Return a run's report for a notebook.

    Args:
        run: The run.
        step: Speak of the peak within this step.
        device: Speak of this device's memory; without it, as `Run.peak` chooses.
        height: Of the frame, in pixels.

    Raises:
        ValueError: The run has no such step or device.
    """
    return ReportView(render_html(summarise(run, step=step, device=device)), height=height)

"""The dashboard: attnprof's runs in a browser. ``attnprof dashboard RUNS_DIR`` starts it."""

from typing import Any

__all__ = ["jupyter"]


def __getattr__(name: str) -> Any:
    if name == "jupyter":  # imported when asked for: it brings Dash with it
        from attnprof_dashboard.notebook import jupyter

        return jupyter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

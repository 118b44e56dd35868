"""What the colours of a timeline mean: categories, and the phases of the ribbon above it."""

from collections.abc import Iterable

from dash import html
from dash.development.base_component import Component

from attnprof.palette import stack_order
from attnprof_dashboard.components.tables import label_category
from attnprof_dashboard.figures.theme import PHASE_COLOURS


def show_legend(
    categories: Iterable[str], phases: Iterable[str], *, pressed: str | None = None
) -> Component:
    """Return the legend.

    Args:
        categories: Those of the picture.
        phases: Those of its ribbon.
        pressed: Make buttons that show one category alone; of this one, the pressed one.
    """
    names = sorted(categories, key=stack_order)
    entries = [
        html.Span(label_category(name), className="legend-entry")
        if pressed is None
        else _make_button(name, is_pressed=name == pressed)
        for name in names
    ]
    known = [name for name in PHASE_COLOURS if name in set(phases)]
    entries += [_name_phase(name) for name in known]
    return html.Div(entries, className="legend")


def _make_button(category: str, *, is_pressed: bool) -> Component:
    return html.Button(
        label_category(category),
        className="legend-entry",
        type="button",
        title=f"show {category} alone, or all again",
        **{"data-category": category, "aria-pressed": "true" if is_pressed else "false"},
    )


def _name_phase(phase: str) -> Component:
    ribbon = html.I(className="swatch phase", style={"background": PHASE_COLOURS[phase]})
    return html.Span([ribbon, phase], className="legend-entry why")

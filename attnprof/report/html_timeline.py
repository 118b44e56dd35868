"""The timeline's section of the page, and what the page's script needs to know of it."""

from html import escape

from attnprof.palette import colour_of
from attnprof.report.drawing import HEIGHT, WIDTH, Drawing, draw_timeline, find_times, place_steps
from attnprof.report.html_parts import label_category, make_section, percent
from attnprof.report.summary import Summary
from attnprof.units import format_bytes

_POINTS = 3000
"""Instants of the timeline: more than a screen has columns, so that zooming shows more."""
_MAX_STEP_BANDS = 300
"""More steps than this are no longer told apart below the timeline."""


def draw_summary(summary: Summary) -> Drawing | None:
    """Draw the timeline of the peak's device; None if nothing was ever live."""
    if not summary.peak.total_bytes:
        return None
    return draw_timeline(summary.run.timeline(_POINTS, device=summary.peak.device))


def describe_drawing(summary: Summary, drawing: Drawing | None) -> object:
    """Return what the script needs."""
    if drawing is None:
        return None
    return {
        "micros": drawing.micros,
        "sizes": drawing.sizes,
        "peak": drawing.place_time(summary.peak.time_ns),
        "steps": _find_bands(summary, drawing),
        "width": WIDTH,
        "height": HEIGHT,
    }


def _find_bands(summary: Summary, drawing: Drawing) -> list[tuple[int, float, float]]:
    if len(summary.steps) > _MAX_STEP_BANDS:
        return []
    return place_steps(drawing, summary.steps.select("step", "begin_ns", "end_ns").rows())


def make_timeline(summary: Summary, drawing: Drawing | None) -> str:
    """Return the section with the timeline, complete without the page's script."""
    if drawing is None:
        return ""
    device = escape(summary.peak.device)
    why = f"Live bytes on {device}, in the order of the legend from the bottom up."
    return make_section("Over time", why, _plot(summary, drawing) + _legend(drawing))


def _plot(summary: Summary, drawing: Drawing) -> str:
    """Return axes, areas and the mark of the peak."""
    peak = drawing.place_time(summary.peak.time_ns)
    height = summary.peak.total_bytes / drawing.top_bytes
    label = escape(f"peak {format_bytes(summary.peak.total_bytes)}")
    tops = [(percent(1 - size / drawing.top_bytes), size) for size in drawing.ticks]
    ticks = "".join(f'<span style="top:{top}">{format_bytes(size)}</span>' for top, size in tops)
    lines = "".join(f'<div class="grid" style="top:{top}"></div>' for top, _ in tops)
    paths = "".join(
        f'<path d="{path}" fill="{colour_of(name)}"/>'
        for name, path in reversed(list(zip(drawing.names, drawing.paths, strict=True)))
    )
    times = "".join(
        f'<span style="left:{percent(at)}">{text}</span>' for at, text in find_times(drawing.span)
    )
    return (
        f'<div class="chart"><div class="flag"><span style="left:{percent(peak)};'
        f'transform:translateX({percent(-peak)})">{label}</span></div>'
        f'<div class="yaxis">{ticks}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="live bytes by category over time; '
        f'{label}">{lines}<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'aria-hidden="true">{paths}</svg><div class="peakline" style="left:{percent(peak)}">'
        f'<i style="top:{percent(1 - height)}"></i></div><div class="chosen" hidden></div>'
        f'<div class="cursor" hidden></div></div>'
        f"{_step_bands(summary, drawing)}"
        f'<div class="xaxis">{times}</div></div>'
    )


def _step_bands(summary: Summary, drawing: Drawing) -> str:
    bands = _find_bands(summary, drawing)
    if not bands:
        return ""
    cells = "".join(
        f'<i class="{"peak" if number == summary.peak.step else ""}" '
        f'style="left:{percent(begin)};width:{percent(end - begin)}">'
        f"{number if end - begin > 0.1 else ''}</i>"
        for number, begin, end in bands
    )
    return f'<div class="axislabel">step</div><div class="steps">{cells}</div>'


def _legend(drawing: Drawing) -> str:
    entries = "".join(
        f"<li>{label_category(name)}<b>{format_bytes(max(sizes))}</b></li>"
        for name, sizes in zip(drawing.names, drawing.sizes, strict=True)
    )
    return (
        '<div class="tools"><output>The most each category held</output>'
        '<button type="button" class="needs-script" id="near">Zoom to the peak</button>'
        '<button type="button" class="needs-script" id="whole">Whole run</button></div>'
        f'<ul class="legend">{entries}</ul>'
    )

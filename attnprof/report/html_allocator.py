"""The allocator on the page."""

from html import escape

from attnprof.report.allocator_summary import AllocatorSummary, describe_state, explain_failure
from attnprof.report.allocator_text import MOST_HOLDINGS
from attnprof.report.html_parts import label_category, make_row, make_section, make_table
from attnprof.report.verdict import format_share
from attnprof.units import format_bytes


def make_allocator(summary: AllocatorSummary | None) -> str:
    """Return the sections on a failed request and on reserved memory; nothing if unknown."""
    if summary is None:
        return ""
    return _section_failure(summary) + _section_state(summary)


def _section_state(summary: AllocatorSummary) -> str:
    if summary.state is None or not summary.state.reserved_bytes:
        return ""
    why = "What the allocator kept of the device at the peak, in use or not."
    return make_section("Reserved memory", why, f"<p>{escape(describe_state(summary.state))}</p>")


def _section_failure(summary: AllocatorSummary) -> str:
    if summary.failure is None:
        return ""
    total = summary.failure.held.total_bytes
    body = "".join(f"<p>{escape(line)}</p>" for line in explain_failure(summary.failure))
    rows = [
        make_row(
            [
                ("name", escape(each.layer or "(unknown)")),
                ("word", label_category(each.category)),
                ("num", format_bytes(each.size_bytes)),
                ("num", escape(format_share(each.size_bytes, total))),
            ]
        )
        for each in summary.holdings[:MOST_HOLDINGS]
    ]
    rest = summary.holdings[MOST_HOLDINGS:]
    if rest:
        size = sum(each.size_bytes for each in rest)
        share = escape(format_share(size, total))
        rows.append(
            make_row(
                [
                    ("quiet", f"{len(rest)} more"),
                    ("", ""),
                    ("num", format_bytes(size)),
                    ("num", share),
                ]
            )
        )
    head = [("", "held by"), ("", "category"), ("num", "bytes"), ("num", "share")]
    why = "The last request that the device had no room for, and who held its memory then."
    return make_section("Out of memory", why, body + make_table(head, rows))

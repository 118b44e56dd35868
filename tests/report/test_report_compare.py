"""Two peaks side by side."""

from report_runs import MIB, make_peak

from attnprof.report.compare import compare_peaks

FIRST = [("a", "softmax", 9), ("a", "inputs", 1)]
SECOND = [("a", "inputs", 1), ("a", "attention_io", 2)]


def test_changes_sum_to_the_difference_of_the_peaks() -> None:
    first, second = make_peak(FIRST), make_peak(SECOND)
    changes = compare_peaks(first, second)
    assert sum(c.difference_bytes for c in changes) == second.total_bytes - first.total_bytes
    assert sum(c.first_bytes for c in changes) == first.total_bytes
    assert sum(c.second_bytes for c in changes) == second.total_bytes


def test_changes_come_largest_first() -> None:
    changes = compare_peaks(make_peak(FIRST), make_peak(SECOND))
    found = [(c.name, c.difference_bytes) for c in changes]
    assert found == [("softmax", -9 * MIB), ("attention_io", 2 * MIB), ("inputs", 0)]

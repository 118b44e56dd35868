"""The one sentence, and what counts as growing with n²."""

import pytest
from report_runs import MIB, make_layers, make_peak

from attnprof.report.summary import group_layers, summarise
from attnprof.report.verdict import format_share, measure_quadratic, write_verdict
from attnprof.run import Run


def test_verdict_names_peak_place_and_share() -> None:
    layer = "h.0.attn"
    peak = make_peak(
        [(layer, "softmax", 3), (layer, "attention_scores", 1), ("h.0.mlp", "activations", 4)]
    )
    assert write_verdict(peak, make_layers(["materialised"])) == (
        "The peak was 8.0 MiB on cuda:0 in step 1, backward, at h.3.attn; 50 % of it was "
        "attention that grows with n²: softmax 3.0 MiB, attention_scores 1.0 MiB."
    )


def test_verdict_of_a_step_says_so() -> None:
    peak = make_peak([("h.0.attn", "softmax", 3)])
    verdict = write_verdict(peak, make_layers(["materialised"]), step=1)
    assert verdict.startswith("The peak of step 1 was 3.0 MiB on cuda:0 in backward, at h.3.attn;")


def test_verdict_without_scores_names_the_largest_category() -> None:
    peak = make_peak([("h.0.mlp", "activations", 3), ("h.0.attn", "attention_io", 1)])
    assert write_verdict(peak, make_layers(["fused"])).endswith(
        "nothing in it grows with n²; most of it was activations, 3.0 MiB (75 %)."
    )


def test_verdict_without_attention_says_so() -> None:
    peak = make_peak([("mlp", "activations", 3)])
    assert "no attention was found" in write_verdict(peak, make_layers(["fused"]).clear())


def test_verdict_of_nothing_says_so() -> None:
    assert write_verdict(make_peak([]), make_layers(["fused"])).startswith("Nothing was recorded")


@pytest.mark.parametrize(("kind", "counts"), [("materialised", True), ("banded", False)])
def test_quadratic_leaves_out_kinds_that_grow_with_n(kind: str, counts: bool) -> None:
    peak = make_peak([("h.0.attn", "softmax", 3), ("h.0.mlp", "activations", 4)])
    expected = {"softmax": 3 * MIB} if counts else {}
    assert measure_quadratic(peak, make_layers([kind])) == expected


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 0, "0 %"), (0, 9, "0 %"), (1, 10**6, "<0.1 %"), (1, 250, "0.4 %"), (999, 10_000, "10 %"),
     (61, 100, "61 %"), (1, 1, "100 %")],
)  # fmt: skip
def test_share_is_short(part: int, whole: int, text: str) -> None:
    assert format_share(part, whole) == text


def test_summary_categories_sum_to_the_peak(real_run: Run) -> None:
    for step in (None, 0, 1):
        summary = summarise(real_run, step=step)
        assert sum(summary.categories.values()) == summary.peak.total_bytes > 0
        assert sum(holder.size_bytes for holder in summary.holders) == summary.peak.total_bytes


def test_summary_of_an_unknown_step_says_which_there_are(real_run: Run) -> None:
    with pytest.raises(ValueError, match=r"the run has no step 7; it has: 0, 1"):
        summarise(real_run, step=7)


def test_summary_notes_always_say_what_is_unattributed(real_run: Run) -> None:
    notes = {note.subject: note for note in summarise(real_run).notes}
    assert notes["unattributed"].text == "0 B, 0 % of the peak"
    assert notes["inferred"].text.startswith("no blocks")
    assert notes["status"].text == "completed"


def test_layers_that_are_alike_are_folded(real_run: Run) -> None:
    (group,) = group_layers(real_run.layers())
    assert (group.layer, group.count) == ("[0-1]", 2)


def test_layers_that_differ_stay_apart() -> None:
    groups = group_layers(make_layers(["banded", "fused", "fused", "banded"]))
    assert [(g.layer, g.count) for g in groups] == [
        ("h.0.attn", 1),
        ("h.[1-2].attn", 2),
        ("h.3.attn", 1),
    ]

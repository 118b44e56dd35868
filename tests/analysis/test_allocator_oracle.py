"""The simulated allocator against torch's own: its answers, recorded by tests/oracle/record.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from attnprof.analysis.allocator import AllocatorSettings, CachingAllocator

RECORDED = Path(__file__).parents[1] / "oracle" / "allocator.json"
CASES = [json.loads(line) for line in RECORDED.read_text().splitlines()]


def answer_requests(allocator: CachingAllocator, requests: list[str]) -> list[list[int]]:
    """Return, after each request: failed, reserved, allocated, requested, inactive split bytes."""
    addresses: list[int | None] = []
    answers = []
    for request in requests:
        command, *numbers = request.split()
        failed = False
        if command == "m":
            addresses.append(allocator.malloc(int(numbers[0]), stream=int(numbers[1])))
            failed = addresses[-1] is None
        elif command == "f":
            address = addresses[int(numbers[0])]
            if address is not None:
                allocator.free(address)
        else:
            allocator.empty_cache()
        answers.append(
            [
                int(failed),
                allocator.reserved_bytes,
                allocator.allocated_bytes,
                allocator.requested_bytes,
                allocator.inactive_split_bytes,
            ]
        )
    return answers


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{case['conf'] or 'defaults'}-{case['capacity']}" for case in CASES]
)
def test_allocator_answers_as_torchs_own(case: dict[str, Any]) -> None:
    settings = AllocatorSettings.parse(case["conf"])
    allocator = CachingAllocator(settings, capacity_bytes=case["capacity"])
    assert answer_requests(allocator, case["requests"]) == case["answers"]


def test_recorded_answers_cover_running_out_of_memory() -> None:
    failing = {case["conf"] for case in CASES if any(answer[0] for answer in case["answers"])}
    assert {"", "expandable_segments:True", "max_split_size_mb:20"} <= failing

"""What the tests of a session measured: JSON to keep and commit, and what changed since."""

import json
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from attnprof.units import format_bytes, parse_bytes

FORMAT = 1
_FORMAT_KEY = "attnprof_baseline"
_RENEW = "delete it and make it anew with --attnprof-save"
_THRESHOLD = re.compile(r"\s*([a-z_]+)\s*:\s*(\S.*?)\s*")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Result:
    """What one test measured."""

    sizes: dict[str, int]
    """In bytes, by the name of the limit; what is missing is 0."""
    laws: dict[str, str] = field(default_factory=dict)
    """By category, the law it follows, in words, where the test has a law of growth."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """By how much a value may exceed its baseline."""

    name: str
    percent: Fraction | None
    """Of the baseline; None if bytes are given."""
    size_bytes: int

    def limit(self, before: int) -> int:
        """Return the most bytes that a value may have whose baseline is ``before``."""
        if self.percent is None:
            return before + self.size_bytes
        return before + int(before * self.percent / 100)

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{float(self.percent):g} %"
        return format_bytes(self.size_bytes)


def read_thresholds(text: str, known: Collection[str]) -> tuple[Threshold, ...]:
    """Read ``peak:5%,softmax:0``.

    Args:
        text: A comma between thresholds, each a name and how much more is allowed.
        known: The names there are.

    Raises:
        ValueError: A part is not a known name, a colon, and a percentage or a size; or a name
            comes twice.
    """
    thresholds: dict[str, Threshold] = {}
    for part in text.split(","):
        match = _THRESHOLD.fullmatch(part)
        if match is None or match[1] not in known:
            raise ValueError(
                f"cannot read {part!r} as a threshold; expected how much more is allowed of one "
                f"of {', '.join(known)}, such as peak:5% or softmax:0"
            )
        if match[1] in thresholds:
            raise ValueError(f"{match[1]} has two thresholds; give one")
        percent = _PERCENT.fullmatch(match[2])
        thresholds[match[1]] = Threshold(
            match[1],
            Fraction(percent[1]) if percent else None,
            0 if percent else parse_bytes(match[2]),
        )
    return tuple(thresholds.values())


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the tests of one session, or of several in one environment, measured."""

    environment: dict[str, str]
    """What memory depends on beside the program: versions, and the device."""
    tests: dict[str, Result]
    """By node id."""

    def to_json(self) -> str:
        """Return text that changes only where a value does: sorted, a line per value."""
        tests = {
            test: {"bytes": result.sizes} | ({"laws": result.laws} if result.laws else {})
            for test, result in self.tests.items()
        }
        content = {_FORMAT_KEY: FORMAT, "environment": self.environment, "tests": tests}
        return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Baseline":
        """Read a file that `to_json` made.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It cannot be read, or is something else.
        """
        if path.exists() and not path.is_file():  # a device might never end
            raise ValueError(f"the baseline {path} is no file; give the name of one")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"cannot read the baseline {path}: {error}; restore it, or {_RENEW}"
            ) from None
        version = content.get(_FORMAT_KEY) if isinstance(content, dict) else None
        if version is None:
            raise ValueError(
                f"{path} is no baseline: expected a JSON file that --attnprof-save wrote"
            )
        if version != FORMAT:
            raise ValueError(
                f"the baseline {path} has format {version!r}, and this attnprof reads {FORMAT}; "
                f"use the attnprof that wrote it, or {_RENEW}"
            )
        try:
            return _read_content(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"the baseline {path} is damaged: expected an environment, and bytes for each "
                f"test; restore it, or {_RENEW}"
            ) from None

    def merge(self, now: "Baseline") -> "Baseline":
        """Return this with what was measured now in place of the same tests' values."""
        return Baseline(now.environment, {**self.tests, **now.tests})


def _read_content(content: Mapping[str, Any]) -> Baseline:
    tests = {}
    for test, result in content["tests"].items():
        sizes = dict(result["bytes"])
        if not all(type(size) is int and size >= 0 for size in sizes.values()):
            raise ValueError("a size is no whole number of bytes")
        tests[test] = Result(sizes, dict(result.get("laws", {})))
    return Baseline({name: str(value) for name, value in content["environment"].items()}, tests)


def pick_environment(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return that part of run.json's description of where it ran on which bytes may depend."""
    described = recorded["environment"]
    gpus = described.get("gpus") or ["cpu"]
    found = {
        "attnprof": described.get("attnprof"),
        "device": gpus[0],
        "machine": platform.machine(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": described.get("torch"),
        "transformers": described.get("transformers"),
    }
    return {name: str(value) for name, value in found.items() if value}


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in a line what is different about the environment; empty if nothing is."""
    names = sorted({*before, *now})
    return ", ".join(
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if before.get(name) != now.get(name)
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """One value of one test, before and now."""

    test: str
    name: str
    before: int
    now: int

    def __str__(self) -> str:
        change = self.now - self.before
        share = f", {100 * change / self.before:+.1f} %" if self.before else ""
        sign = "+" if change >= 0 else ""
        return (
            f"{self.test}: {self.name} {format_bytes(self.before)} -> {format_bytes(self.now)} "
            f"({sign}{format_bytes(change)}{share})"
        )


def compare(before: Baseline, now: Baseline) -> list[Difference]:
    """Return every value that differs, for the tests that both have, the largest growth first."""
    found = [
        Difference(test, name, old.sizes.get(name, 0), new.sizes.get(name, 0))
        for test, new in now.tests.items()
        if (old := before.tests.get(test)) is not None
        for name in sorted({*old.sizes, *new.sizes})
        if old.sizes.get(name, 0) != new.sizes.get(name, 0)
    ]
    return sorted(found, key=lambda d: (d.before - d.now, d.test, d.name))


def compare_laws(before: Baseline, now: Baseline) -> list[str]:
    """Return a line for every law of growth that differs, for the tests that both have."""
    return [
        f"{test}: {category} grew as {old.laws[category]}, and now as {law}"
        for test, new in sorted(now.tests.items())
        if (old := before.tests.get(test)) is not None
        for category, law in sorted(new.laws.items())
        if old.laws.get(category, law) != law
    ]

"""What the tests of a session measured: JSON to keep and commit, and what changed since."""

import json
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attnprof.units import format_bytes, parse_bytes

FORMAT = 1
_THRESHOLD = re.compile(r"\s*([a-z_]+)\s*:\s*(\S.*?)\s*")
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")

Values = dict[str, int]
"""What one test measured, in bytes, by the name of the limit."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """By how much a value may exceed its baseline."""

    name: str
    percent: float | None
    size_bytes: int

    def allows(self, before: int, now: int) -> bool:
        """Return whether ``now`` is not too much more than ``before``."""
        more = before * self.percent / 100 if self.percent is not None else self.size_bytes
        return now - before <= more

    def __str__(self) -> str:
        return f"{self.percent:g} %" if self.percent is not None else format_bytes(self.size_bytes)


def read_thresholds(text: str, known: tuple[str, ...]) -> list[Threshold]:
    """Read ``peak:5%,softmax:0``.

    Args:
        text: A comma between thresholds, each a name and how much more is allowed.
        known: The names there are.

    Raises:
        ValueError: A part is not a known name, a colon, and a percentage or a size.
    """
    thresholds = []
    for part in text.split(","):
        match = _THRESHOLD.fullmatch(part)
        if match is None or match[1] not in known:
            raise ValueError(
                f"cannot read {part!r} as a threshold; expected how much more is allowed of one "
                f"of {', '.join(known)}, such as peak:5% or softmax:0"
            )
        percent = _PERCENT.fullmatch(match[2])
        size = 0 if percent else parse_bytes(match[2])
        thresholds.append(Threshold(match[1], float(percent[1]) if percent else None, size))
    return thresholds


@dataclass(frozen=True, slots=True)
class Results:
    """What the tests of one session measured."""

    environment: dict[str, str]
    """What memory depends on beside the program: versions, and the device."""
    tests: dict[str, Values]
    """By node id."""

    def to_json(self) -> str:
        """Return text that changes only where a value does: sorted, a line per value."""
        content = {"format": FORMAT, "environment": self.environment, "tests": self.tests}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read a file that `to_json` made.

        Raises:
            ValueError: There is none, or it is something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"there is no baseline {path}; make one with --attnprof-save"
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the baseline {path}: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f"{path} is no baseline of this attnprof: its format is {found!r}, expected "
                f"{FORMAT}; make a new one with --attnprof-save"
            )
        return cls(dict(content["environment"]), {k: dict(v) for k, v in content["tests"].items()})


def describe_environment() -> dict[str, str]:
    """Return the versions and the device on which memory depends beside the program."""
    found = {
        "attnprof": _find_version("attnprof"),
        "machine": platform.machine(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": _find_version("torch"),
        "transformers": _find_version("transformers"),
    }
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return {name: value for name, value in found.items() if value}


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


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


def compare(before: Results, now: Results) -> list[Difference]:
    """Return every value that differs, for the tests that both have, the largest growth first."""
    found = [
        Difference(test, name, old.get(name, 0), new.get(name, 0))
        for test, new in now.tests.items()
        if (old := before.tests.get(test)) is not None
        for name in sorted({*old, *new})
        if old.get(name, 0) != new.get(name, 0)
    ]
    return sorted(found, key=lambda d: (d.before - d.now, d.test, d.name))


def find_regressions(
    differences: list[Difference], thresholds: list[Threshold]
) -> Iterator[tuple[Difference, Threshold]]:
    """Yield the differences that exceed the threshold for their name."""
    for difference in differences:
        for threshold in thresholds:
            if threshold.name == difference.name and not threshold.allows(
                difference.before, difference.now
            ):
                yield difference, threshold


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in a line what is different about the environment; empty if nothing is."""
    names = sorted({*before, *now})
    return ", ".join(
        f"{name} {before.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in names
        if before.get(name) != now.get(name)
    )

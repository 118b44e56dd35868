"""``attnprof doctor``: what can be measured on this machine, and why the rest cannot."""

import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from attnprof.cli.dashboard import NEEDED, find_missing
from attnprof.errors import AttnprofError

OLDEST_TORCH = (2, 8)
"""As pyproject.toml has it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    subject: str
    ok: bool
    detail: str
    """What was found; where it is not ok, what to do."""
    needed: bool = False
    """Without it nothing can be recorded."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> int:
    """Say what can be measured on this machine, and what is missing for the rest.

    Ends with exit code 0 if programs can be recorded here, and 1 if not.
    """
    from attnprof.cli.console import working

    with working("looking around …"):
        checks = list(examine())
    works = all(check.ok for check in checks if check.needed)
    if as_json:
        import json

        print(json.dumps({"works": works, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        _print_checks(checks, works)
    return 0 if works else 1


def examine() -> Iterator[Check]:
    """Yield every check, in the order in which they matter."""
    yield Check("python", True, platform.python_version(), needed=True)
    torch = _check_torch()
    yield torch
    if torch.ok:
        yield from _check_devices()
        yield from _check_allocator()
        yield _check_tracing()
    yield _check_here()
    yield _check_optional("transformers", ["transformers"], "attnprof demo", "demo")
    yield _check_optional("dash", NEEDED, "the dashboard", "dashboard")


def _check_torch() -> Check:
    oldest = ".".join(map(str, OLDEST_TORCH))
    try:
        found = version("torch")
        import_module("torch")
    except PackageNotFoundError:
        return Check("torch", False, f"not installed; pip install 'torch>={oldest}'", needed=True)
    except Exception as error:  # a broken build fails in many ways, and that is the finding
        return Check("torch", False, f"cannot be imported: {_one_line(error)}", needed=True)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        detail = f"{found} is too old; pip install 'torch>={oldest}'"
        return Check("torch", False, detail, needed=True)
    return Check("torch", True, f"{found} (supported from {oldest} on)", needed=True)


def _check_devices() -> Iterator[Check]:
    from attnprof.capture.devices import GpuReader
    from attnprof.cli.program import load_own_script

    try:
        ok, detail = load_own_script("check_torch").describe_cuda()
    except Exception as error:  # a driver that does not fit torch fails in many ways
        ok, detail = False, _one_line(error)
    yield Check("cuda", ok, detail)
    reader = GpuReader()
    found = f"{len(reader.read())} GPU(s) seen"
    yield Check("nvml", reader.why_not is None, reader.why_not or found)
    reader.close()


def _check_allocator() -> Iterator[Check]:
    from attnprof.capture.cuda import describe_support

    try:
        for subject, ok, detail in describe_support():
            if subject != "CUDA":  # said above, with the names of the devices
                yield Check(subject, ok, detail)
    except Exception as error:  # the finding is that it does not work here
        yield Check("allocator", False, _one_line(error))


def _check_tracing() -> Check:
    """Trace a step of two attention layers and see that the categories sum to the peak."""
    from attnprof.capture.tracer import trace
    from attnprof.cli.program import load_own_script
    from attnprof.units import format_bytes

    try:
        with trace(samples_per_second=0) as tracer:
            load_own_script("check_torch").step()
        peak, layers = tracer.run.peak(), tracer.run.layers()
    except Exception as error:  # whatever it is, tracing does not work here
        return Check("tracing", False, _one_line(error), needed=True)
    total = sum(peak.by_category().values())
    if total != peak.total_bytes or not total:
        detail = f"categories sum to {total} bytes, the peak is {peak.total_bytes}; report this"
        return Check("tracing", False, detail, needed=True)
    kinds = ", ".join(sorted(set(layers["kind"].to_list())))
    detail = (
        f"a step of two layers: peak {format_bytes(total)}, which is what its categories sum to; "
        f"{len(layers)} attention layers found ({kinds or 'none'})"
    )
    return Check("tracing", len(layers) == 2, detail, needed=True)


def _check_here() -> Check:
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        detail = f"cannot write to {here} ({error.strerror}); give attnprof run a --out elsewhere"
        return Check("this folder", False, detail)
    return Check("this folder", True, f"runs can be written to {here}{os.sep}runs")


def _check_optional(package: str, needed: Iterable[str], use: str, extra: str) -> Check:
    """Say which version of a package there is, if all the modules are there that its use needs."""
    missing = find_missing(needed)
    if missing:
        detail = f"{use} needs {', '.join(missing)}; pip install 'attnprof[{extra}]'"
        return Check(package, False, detail)
    try:
        return Check(package, True, version(package))
    except PackageNotFoundError:  # it lies on the path, and was never installed
        return Check(package, True, "of an unknown version")


def _one_line(error: BaseException) -> str:
    if isinstance(error, AttnprofError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _print_checks(checks: list[Check], works: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    from attnprof.cli.console import print_report
    from attnprof.report.tables import Column, FittedTable, show_name

    rows = []
    for check in checks:
        mark = ("ok", "green") if check.ok else ("NO", "bold red") if check.needed else ("–", "dim")
        rows.append([Text(*mark), Text(check.subject), Text(show_name(check.detail))])
    columns = [Column(""), Column(""), Column("", is_name=True)]
    verdict = (
        Text("Programs can be recorded on this machine.", style="bold green")
        if works
        else Text("Programs cannot be recorded on this machine; see NO above.", style="bold red")
    )
    print_report(Group(FittedTable(columns, rows, has_head=False), Text(), verdict))

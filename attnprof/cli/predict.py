"""``attnprof predict``: whether a workload fits a device, before it is run there."""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnprof.errors import AttnprofError, CommandError

if TYPE_CHECKING:
    from attnprof.cli.target import Target
    from attnprof.report.machine import Machine
    from attnprof.report.prediction import Prediction
    from attnprof.run import Run

FITS, DOES_NOT_FIT, COULD_NOT_RUN, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""


def predict(
    target: Annotated[
        str,
        typer.Argument(
            metavar="SCRIPT:FUNCTION",
            help="A function make_step(seq_len, device) that builds model and inputs and returns "
            "a function that runs one step; or MODULE:FUNCTION.",
            show_default=False,
        ),
    ],
    seq_len: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="The length, in tokens: 4096, 128K or 1M (K is 1024).",
            show_default=False,
        ),
    ],
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="What it has to fit into: a device such as H200, or a size such as '80 GB'. "
            "Without it, this machine's GPU.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the dry run there, for attnprof report: a new or empty directory.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
) -> int:
    """Run a workload dry and say whether it fits a device: attnprof predict … && python train.py.

    The program itself runs, on tensors that have shapes and no memory, with the kernels and the
    allocator of the device. The report says who holds the peak, up to which length it would fit,
    and what would lower it.

    Ends with exit code 0 if it fits, 1 if it does not, and 2 if it could not be run.
    """
    from attnprof.cli.console import printing_to_stderr
    from attnprof.cli.target import Target
    from attnprof.report.machine import find_machine
    from attnprof.units import parse_length

    length, workload = parse_length(seq_len), Target(target)
    machine = find_own_gpu() if device is None else find_machine(device)
    try:
        with printing_to_stderr(as_json):
            prediction = _dry_run(workload, length, machine, out)
    except (AttnprofError, OSError, ValueError):
        raise  # said in one line
    except Exception:  # ours, and 1 would mean that it does not fit
        sys.excepthook(*sys.exc_info())
        return COULD_NOT_RUN
    if isinstance(prediction, int):
        return prediction
    if as_json:
        from attnprof.report.prediction_json import render_prediction_json

        print(render_prediction_json(prediction))
    else:
        from attnprof.cli.console import print_report
        from attnprof.report.prediction_text import render_prediction_text

        print_report(render_prediction_text(prediction))
    return FITS if prediction.fits else DOES_NOT_FIT


def find_own_gpu() -> "Machine":
    """Return this machine's first GPU.

    Raises:
        CommandError: It has none.
    """
    from attnprof.report.machine import describe_gpu

    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # not installed, or no driver: normal on a machine without GPU
        raise CommandError(
            f"this machine has no GPU to predict for ({error}); name what the workload has to fit "
            "into with --device, such as H200 or '80 GB'"
        ) from None
    try:
        first = pynvml.nvmlDeviceGetHandleByIndex(0)
        total_bytes = pynvml.nvmlDeviceGetMemoryInfo(first).total
        return describe_gpu(pynvml.nvmlDeviceGetName(first), total_bytes)
    finally:
        pynvml.nvmlShutdown()


def choose_other_length(seq_len: int) -> int:
    """Return a second length, to tell the law: half, or twice where that is no whole number.

    A program that takes a length mostly takes these too: they are multiples of what it is a
    multiple of, or not longer.
    """
    return 2 * seq_len if seq_len % 2 else seq_len // 2


def _dry_run(
    workload: "Target", seq_len: int, machine: "Machine", out: Path | None
) -> "Prediction | int":
    """Run dry at the length and, beside it, at another; return the exit code if that fails."""
    from attnprof.cli.aside import dry_running_aside
    from attnprof.cli.console import fail, working
    from attnprof.cli.target import is_from_workload, load_without_collecting, show_failure
    from attnprof.report.words import NO_TENSORS

    with ExitStack() as stack:
        try:
            load_without_collecting(workload)
            from attnprof.capture.dry_run import dry_run

            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="attnprof-predict-"))
            wait_for_other = stack.enter_context(
                dry_running_aside(
                    workload,
                    choose_other_length(seq_len),
                    device=machine.target,
                    directory=Path(scratch) / "other",
                )
            )
            with working(f"running dry at n = {seq_len} …"):
                run = dry_run(workload, seq_len, target=machine.target, directory=out)
            if run.allocations.is_empty():  # and 0 bytes would fit anywhere
                raise CommandError(NO_TENSORS)
        except KeyboardInterrupt:
            return fail("interrupted", INTERRUPTED)
        except BaseException as error:
            if is_from_workload(error):
                show_failure(error)
                return COULD_NOT_RUN
            if isinstance(error, TypeError):  # make_step is none
                raise CommandError(str(error)) from None
            raise
        return _gather(run, machine, wait_for_other)


def _gather(run: "Run", machine: "Machine", wait_for_other: Callable[[], "Run"]) -> "Prediction":
    from attnprof.cli.console import working
    from attnprof.report.prediction import predict as gather

    with working("looking for the wall …"):
        try:
            other, why_not = wait_for_other(), ""
        except RuntimeError as error:
            other, why_not = None, str(error)
        return gather(run, machine, other=other, why_no_other=why_not)

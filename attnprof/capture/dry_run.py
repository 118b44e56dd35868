"""`dry_run`: the real program on fake tensors, recorded by the same capture.

The program's own ``make_step`` runs under torch's FakeTensorMode: every op has shapes and dtypes,
none has values, and no memory is used. What is recorded are the same facts as of a real run, so
everything that can be asked of a run can be asked of a dry one.

Known limitations:
    All tensors count as being on the target device; what the program keeps on the host on purpose
    (offloading) is not told apart.
    What kernels take inside themselves is not seen, as in a real run on the CPU; with a CUDA
    target it is added from formulas (`attnprof.attribution.workspace`).
    Caches of a library that outlive the run keep fake tensors; measure first, where both are to
    be done in one process.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnprof.capture.cuda_dialect import CudaDialect
from attnprof.capture.fake_disguise import (
    formatting_fake_tensors,
    hiding_fakeness,
    making_one_hot,
    reading_arrays,
    running_as_written,
)
from attnprof.capture.fake_failures import saying_what_fails
from attnprof.capture.fake_parameters import (
    converting_fake_parameters,
    copying_fake_parameters,
    updating_fake_parameters,
)
from attnprof.capture.fake_twins import Twins
from attnprof.capture.fake_values import FakeValues
from attnprof.capture.tracer import Tracer
from attnprof.capture.workload import MakeStep, check_workload, describe_workload, run_steps
from attnprof.theory.devices import Device, find_device

if TYPE_CHECKING:
    from attnprof.run import Run


def dry_run(
    make_step: MakeStep,
    seq_len: int,
    *,
    target: str = "cpu",
    directory: str | Path | None = None,
    steps: int | None = None,
) -> "Run":
    """Run a workload without its memory, and return its run.

    Args:
        make_step: Builds model and inputs for a length on a device and returns a function
            without arguments that runs one step. The device it gets is ``"cpu"`` whatever the
            target is; everything must be built inside it.
        seq_len: The sequence length n, in tokens.
        target: Whose memory to answer for: ``"cpu"``, ``"cuda"``, or a device such as
            ``"H200"``.
        directory: Where to write the run; a temporary one without it.
        steps: How many steps to run; see `attnprof.capture.workload.record_workload`.

    Raises:
        DryRunError: The program does what fake tensors cannot; the message names the line.
        LengthError: The sequence is longer than a table of positions that the program uses.
        TypeError: ``make_step`` or what it returns cannot be called.
        ValueError: ``seq_len`` or ``steps`` is not a positive whole number, or the target is
            unknown.
        CaptureError: Another trace is running, or the directory cannot be used.
        Exception: Whatever else the workload raises, as it was raised.
    """
    seq_len, steps = check_workload(make_step, seq_len, steps)
    device = None if target in ("cpu", "cuda") else find_device(target)
    on_cuda = target != "cpu"
    workload = describe_workload(make_step, seq_len, source="dry_run")
    about: dict[str, Any] = {
        "target": "cuda" if on_cuda else "cpu",
        "device": None if device is None else device.name,
    }
    assumed: dict[str, None] = {}
    capability = _find_capability(device, assumed) if on_cuda else None
    if capability is not None:
        about["compute_capability"] = capability
    # What has no fake kernel is decided upon in `attnprof.capture.fake_kernels`.
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
    twins = Twins(fake_mode, torch.device("cuda:0" if on_cuda else "cpu"))
    tracer = Tracer(
        directory,
        samples_per_second=0,
        info={"workload": workload, "dry_run": about},
        twins=twins,
    )
    values = FakeValues(assumed, twins)
    with ExitStack() as stack:
        for context in (
            saying_what_fails(),
            converting_fake_parameters(),
            copying_fake_parameters(),
            updating_fake_parameters(as_on_cuda=on_cuda),
            hiding_fakeness(values),
            formatting_fake_tensors(),
            reading_arrays(values),
            running_as_written(assumed),
            making_one_hot(),
            fake_mode,
            values,
        ):
            stack.enter_context(context)
        if capability is not None:
            stack.enter_context(CudaDialect(capability, assumed))
        with tracer:
            workload["steps"] = run_steps(tracer, make_step, seq_len, "cpu", steps)
            about["assumptions"] = list(assumed)
            about["tables"] = values.tables.describe()
    return tracer.run


_USUAL_CAPABILITY = (9, 0)


def _find_capability(device: Device | None, assumed: dict[str, None]) -> tuple[int, int]:
    if device is None:
        assumed[
            "kernels were chosen as on compute capability 9.0 (H100, H200); name the device for "
            "its own"
        ] = None
        return _USUAL_CAPABILITY
    if device.compute_capability is None:
        raise ValueError(
            f"no dry run for {device.name}: its kernels are not CUDA's; name an NVIDIA device, or "
            "measure there"
        )
    return device.compute_capability

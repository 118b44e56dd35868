"""``attnprof demo``: one model, trained with materialised and with fused attention."""

import gc
import os
import shlex
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnprof.errors import CommandError

if TYPE_CHECKING:
    from attnprof.run import Run

VARIANTS = {"materialised": "eager", "fused": "sdpa"}
"""Folder of the run -> transformers' name for that implementation of attention."""

_BATCH, _HEADS, _WIDTH = 4, 6, 384
_SHORTEST = 16


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A new or empty directory for both runs. Without it: runs/demo-<date>-<time>.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Training steps.")] = 3,
    seq_len: Annotated[
        str,
        typer.Option(
            metavar="N", help="Sequence length n, in bytes of text; 1K is 1024. At least 16."
        ),
    ] = "512",
    layers: Annotated[int, typer.Option(min=1, metavar="N", help="Layers of the GPT-2.")] = 6,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Do not offer to open the dashboard.")
    ] = False,
) -> int:
    """Train a small GPT-2 twice, with materialised and with fused attention, and compare.

    The weights are random, the text is Python's own library, and nothing is downloaded. From the
    materialised run alone it is predicted what fused attention would need; then it is measured.
    """
    if find_spec("transformers") is None:
        raise CommandError(
            "the demo trains a GPT-2 of transformers, which is not installed; "
            "pip install 'transformers>=5'"
        )
    length = _read_length(seq_len)
    _require_memory(layers=layers, seq_len=length)
    from attnprof.cli.console import print_report, say
    from attnprof.cli.dashboard import offer_dashboard
    from attnprof.cli.demo_report import render_comparison
    from attnprof.report.summary import summarise
    from attnprof.report.text import render_text

    folder = _claim(out)
    try:
        runs, losses = _train_both(folder, steps=steps, seq_len=length, layers=layers)
    except KeyboardInterrupt:
        say(f"interrupted; what was recorded until then is in {folder}")
        raise typer.Exit(130) from None
    for name, run in runs.items():
        print(f"\n{name.upper()}\n", flush=True)
        print_report(render_text(summarise(run)))
    print("\nWHAT FUSED ATTENTION SAVES\n", flush=True)
    print_report(render_comparison(runs["materialised"], runs["fused"], losses))
    first, page = (shlex.quote(str(folder / n)) for n in ("materialised", "materialised.html"))
    print(f"\nThe first report as a page: attnprof report {first} --html {page}")
    offer_dashboard(folder, is_wanted=not no_browser)
    return 0


def _read_length(text: str) -> int:
    """Return the sequence length that ``--seq-len`` names.

    Raises:
        ValueError: It is no length.
        CommandError: It is shorter than the text of a step has to be.
    """
    from attnprof.units import parse_length

    length = parse_length(text)
    if length < _SHORTEST:
        raise CommandError(f"--seq-len is {length}; the demo needs {_SHORTEST} or more")
    return length


def _require_memory(*, layers: int, seq_len: int) -> None:
    """Refuse a demo that would make the system kill it.

    Raises:
        CommandError: Its softmax results alone would fill the memory that is free.
    """
    import psutil

    from attnprof.units import format_bytes

    # Per layer the saved result; at the peak two gradients of one layer's scores besides.
    needed = (layers + 2) * _BATCH * _HEADS * seq_len**2 * 4
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise CommandError(
            f"{layers} layers at n = {seq_len} keep {format_bytes(needed)} of softmax results when "
            f"attention is materialised, and this machine has {format_bytes(free)} free; "
            "give a smaller --seq-len or fewer --layers"
        )


def _claim(out: Path | None) -> Path:
    from attnprof.cli.run import make_directory
    from attnprof.store.writer import claim_directory

    if out is None:
        return make_directory("demo")
    claim_directory(out)
    return out


def _train_both(
    folder: Path, *, steps: int, seq_len: int, layers: int
) -> tuple[dict[str, "Run"], dict[str, list[float]]]:
    """Train both variants and return their runs and losses."""
    print(
        f"GPT-2 with {layers} layers of width {_WIDTH}, n = {seq_len}, batch {_BATCH}: {steps} "
        "AdamW steps on Python's own source code, from the same random weights.\n"
    )
    runs, losses = {}, {}
    for number, name in enumerate(VARIANTS, 1):
        print(f"[{number}/{len(VARIANTS)}] {name} attention (transformers' {VARIANTS[name]!r})")
        runs[name], losses[name] = _train(
            name, folder / name, steps=steps, seq_len=seq_len, layers=layers
        )
    return runs, losses


def _train(
    name: str, directory: Path, *, steps: int, seq_len: int, layers: int
) -> tuple["Run", list[float]]:
    """Train one variant under a trace, saying each step's loss; return its run and the losses."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from attnprof.capture.tracer import trace
    from attnprof.cli.console import working
    from attnprof.cli.program import load_own_script

    with working("loading transformers …"):
        train = load_own_script("train_gpt2").train
    losses: list[float] = []
    with trace(directory) as tracer:
        losing = train(VARIANTS[name], layers=layers, seq_len=seq_len, batch=_BATCH, steps=steps)
        for step in range(steps):
            begun = time.perf_counter()
            with working(f"step {step} of {steps} …"):
                losses.append(next(losing))
            seconds = time.perf_counter() - begun
            print(f"      step {step}   loss {losses[-1]:.4f}   {seconds:.1f} s", flush=True)
        losing.close()
    gc.collect()  # the second variant starts with the memory that the first did
    return tracer.run, losses

"""``attnprof theory``: what a model must take at some lengths, from its shape alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnprof.errors import CommandError

if TYPE_CHECKING:
    from attnprof.theory.architecture import Architecture


def theory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A public model such as llama-3.1-8b, or the path of a config.json.",
            show_default=False,
        ),
    ],
    seq_len: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            help="A length, or several with commas: 8K,128K,1M. K is 1024, M is 1024 · 1024. "
            "Without it: the model's own context.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Sequences at a time.")] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="T", help="Of weights, activations and cache.")
    ] = "bfloat16",
    device: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="An accelerator such as H100 or 'RTX 4090': adds times and what fits.",
            show_default=False,
        ),
    ] = None,
    training: Annotated[
        bool | None,
        typer.Option(
            "--training/--inference",
            help="Show only what concerns training, or only inference.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; bytes are integers.")
    ] = False,
) -> int:
    """Show what attention must take in a model, from its shape: memory, flops, least times.

    Closed forms, for a model that need not exist yet. For a program of your own measure it
    with attnprof run, or run it dry with attnprof predict.
    """
    from attnprof.theory.devices import find_device
    from attnprof.theory.forecast import forecast_model

    arch = find_architecture(model)
    found = forecast_model(
        arch,
        seq_lens=_read_lengths(seq_len or [], arch),
        batch=batch,
        dtype=dtype,
        device=None if device is None else find_device(device),
    )
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(found), indent=2))
        return 0
    from attnprof.cli.console import print_report
    from attnprof.cli.theory_report import render_forecast

    print_report(render_forecast(found, training=training))
    return 0


def find_architecture(model: str) -> "Architecture":
    """Return a public model by name, or what a config file or its directory describes.

    Raises:
        ValueError: There is neither.
    """
    from attnprof.theory.config import read_config
    from attnprof.theory.models import find_model

    path = Path(model)
    if path.suffix == ".json" or path.is_file() or (path / "config.json").is_file():
        return read_config(path)
    return find_model(model)


def _read_lengths(texts: list[str], arch: "Architecture") -> list[int]:
    """Return the lengths asked for, shortest first; by default the model's context."""
    from attnprof.units import parse_length

    lengths = sorted({parse_length(part) for text in texts for part in text.split(",")})
    if lengths:
        return lengths
    if arch.context_len is None:
        raise CommandError(f"{arch.name} does not say its context; give a length with --seq-len")
    return [arch.context_len]

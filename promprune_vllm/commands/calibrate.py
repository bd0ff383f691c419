"""``promprune calibrate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from promprune_vllm.commands.failures import fail, failing
from promprune_vllm.commands.vllm_cli import fail_without_vllm

_MODEL = Annotated[str, typer.Argument(help="Model name or path, as for vLLM. Must precede vLLM's options.")]
_IMAGES = Annotated[
    list[Path],
    typer.Option("--images", help="Directory of images like the ones you will serve. Repeat for each kind."),
]
_LIMIT = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Images per directory, spread evenly over its file names. Default: all."),
]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document with every value.")]


def calibrate(
    context: typer.Context, model: _MODEL, images: _IMAGES, limit: _LIMIT = None, as_json: _JSON = False
) -> None:
    """Estimate PromPrune's mu for MODEL from the entropy of your images. Accepts vLLM's options, such as --dtype.

    With one directory, mu is the median. With several, it is the midpoint between the lowest and the highest
    median, so it does not depend on how many images each directory has.
    """
    from rich.console import Console

    from promprune_vllm.commands.calibration_table import show
    from promprune_vllm.engine.worker.calibration_run import calibrate as measure

    if model.startswith("-"):
        fail(f"MODEL must come before vLLM's options, got {model} first.")
    err = Console(stderr=True)
    try:
        with failing(), err.status("") as status:
            report = measure(model, images, limit=limit, arguments=context.args, tell=status.update)
    except ImportError as error:
        if "vllm" in sys.modules:
            raise
        fail_without_vllm(error)
    for image in report.skipped:
        typer.echo(f"promprune: skipped {image.file}: {image.reason}", err=True)
    if as_json:
        typer.echo(json.dumps(report.as_document(), indent=2))
    else:
        show(report, Console())

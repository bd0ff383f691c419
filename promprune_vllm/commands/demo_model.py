"""``promprune demo-model``: show, score and train the demo model; write tiny random models of each family."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from promprune_vllm.commands.checkout import import_from_checkout
from promprune_vllm.commands.failures import fail
from promprune_vllm.demo.families import FAMILIES, build_family_model, has_remote_code, serving_dtype
from promprune_vllm.demo.trained import CARD, SCORES, TRAINED

# For tiny models with byte tokens and head size 32: a short context, exact sums, a block size that the CPU
# attention supports.
_TINY_OPTIONS = "--max-model-len 2048 --block-size 32 --enforce-eager"


_FAMILY = Annotated[
    str | None,
    typer.Option(
        "--family",
        help=f"Write a tiny random model to --out: {', '.join(FAMILIES)}.",
    ),
]
_TRAIN = Annotated[bool, typer.Option("--train", help="Train the demo model in --out, or resume there.")]
_SCORE = Annotated[
    bool, typer.Option("--score", help="Score the demo model, or the one in --out, on held-out scenes.")
]
_DRAW = Annotated[
    bool,
    typer.Option("--draw", help="Draw training scenes as PNG files in --out, one folder per kind."),
]
_OUT = Annotated[
    Path | None, typer.Option("--out", help="Directory to write to; with --score, the model to read.")
]
_SEED = Annotated[int, typer.Option("--seed", help="Random seed of weights and scenes.")]
_MINUTES = Annotated[float, typer.Option("--minutes", min=0.01, help="With --train: total training time.")]
_DEVICE = Annotated[str, typer.Option("--device", help="With --train: cpu or cuda.")]
_FRESH = Annotated[
    bool, typer.Option("--fresh/--resume", help="With --train: start over even if there is a checkpoint.")
]
_SCENES = Annotated[int, typer.Option("--scenes", min=1, help="With --score or --draw: scenes per kind.")]
_JSON = Annotated[bool, typer.Option("--json", help="With --score: print one JSON document.")]


def demo_model(
    *,
    family: _FAMILY = None,
    train: _TRAIN = False,
    score: _SCORE = False,
    draw: _DRAW = False,
    out: _OUT = None,
    seed: _SEED = 0,
    minutes: _MINUTES = 240.0,
    device: _DEVICE = "cpu",
    fresh: _FRESH = False,
    scenes: _SCENES = 300,
    as_json: _JSON = False,
) -> None:
    """Print the path and scores of the demo model; train or score it, draw its scenes, or write a random model."""
    modes = {"--family": family, "--train": train, "--score": score, "--draw": draw}
    requested = [name for name, on in modes.items() if on]
    if len(requested) > 1:
        fail(f"{' and '.join(requested)} cannot be combined.")
    if (family or train or draw) and out is None:
        fail(f"{requested[0]} needs --out DIR.")
    if device not in ("cpu", "cuda"):
        fail(f"--device must be cpu or cuda, got {device}.")
    if family and out:
        _write_random(family, out, seed)
    elif train and out:
        _train(out, minutes=minutes, device=device, seed=seed, fresh=fresh)
    elif draw and out:
        _draw(out, scenes)
    elif score:
        _score(out or TRAINED, scenes, as_json=as_json)
    elif not SCORES.is_file():
        fail("This package has no trained demo model yet: promprune demo-model --train --out DIR makes one.")
    else:
        typer.echo(TRAINED)
        typer.echo(f"Model card: {CARD}\nPercent correct on held-out scenes, all 576 tokens:", err=True)
        _show(json.loads(SCORES.read_text())["full"])


def _write_random(family: str, out: Path, seed: int) -> None:
    try:
        directory = build_family_model(family, out, seed=seed)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(directory)
    options = f"--dtype {serving_dtype(family)} {_TINY_OPTIONS}"
    if has_remote_code(family):
        options += " --trust-remote-code"
    # On stderr, so that MODEL=$(promprune demo-model ...) is only the directory.
    typer.echo(f"Serve it with: promprune serve {shlex.quote(str(directory))} {options}", err=True)


def _train(out: Path, *, minutes: float, device: str, seed: int, fresh: bool) -> None:
    training = _training("--train")
    try:
        model = training.train(
            out,
            minutes=minutes,
            device=device,
            seed=seed,
            fresh=fresh,
            tell=lambda text: typer.echo(text, err=True),
        )
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"Stopped. Run the same command to resume from the last checkpoint in {out}.")
    typer.echo(model)
    typer.echo(f"Score it with: promprune demo-model --score --out {shlex.quote(str(model))}", err=True)


def _draw(out: Path, scenes: int) -> None:
    from promprune_vllm.demo.scenes import KINDS, make_scene

    for kind in KINDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
        for seed in range(scenes):
            make_scene(kind, seed, "train").image().save(out / kind / f"{seed:05}.png")
        typer.echo(out / kind)


def _score(directory: Path, scenes: int, *, as_json: bool) -> None:
    if not (directory / "config.json").is_file():
        fail(f"{directory} has no model: promprune demo-model --train --out DIR makes one, as DIR/model.")
    scores = _training("--score").score(directory, scenes)
    if as_json:
        typer.echo(json.dumps({"scenes of each kind": scenes} | scores, indent=2))
        return
    for way, one in scores.items():
        typer.echo(f"\n{way} tokens")
        _show(one)


def _show(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        typer.echo(f"  {value:7.3f}  {name}" if value <= 1 else f"  {value:5.1f}%  {name}", err=True)


def _training(option: str) -> ModuleType:
    """Import the training, which is not part of the package."""
    return import_from_checkout("deploy.training.run", f"demo-model {option}")

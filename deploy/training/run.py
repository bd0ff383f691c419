"""What ``promprune demo-model --train`` and ``--score`` run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploy.training.export import export
from deploy.training.scoring import check, held_out_scenes, load
from deploy.training.scoring import score as score_model
from deploy.training.trainer import CHECKPOINT, LOG, Trainer


def train(out: Path, *, minutes: float, device: str, seed: int, fresh: bool, tell: Callable[[str], None]) -> Path:
    """Train a model in a directory, or go on with the one there, and write it as a checkpoint to ``out/model``.

    Args:
        out: Holds the training's own checkpoint and log.
        minutes: Of training altogether.
        device: "cpu" or "cuda".
        seed: Of the weights and the scenes.
        fresh: Begin anew even if there is a checkpoint.
        tell: Is told about progress.

    Raises:
        ValueError: The training in ``out`` has another seed.
        ModuleNotFoundError: scikit-image is not installed.
    """
    if fresh:
        for name in (CHECKPOINT, LOG):
            (out / name).unlink(missing_ok=True)
    trainer = Trainer(out, minutes=minutes, device=device, seed=seed, tell=tell)
    trainer.train(check)
    return export(trainer.model, out / "model")


def score(directory: Path, scenes: int) -> dict[str, dict[str, float]]:
    """Score an exported model on held-out scenes.

    Args:
        directory: The checkpoint.
        scenes: How many of each kind.

    Returns:
        How many tokens it reads and how they are chosen -> what `scoring.score` returns.
    """
    model, held_out = load(directory), held_out_scenes(scenes, scenes)
    ways = {"full": {}, "random 64": {"keep": 64}, "uniform 64": {"keep": 64, "sampler": "uniform"}}
    return {way: score_model(model, held_out, **options) for way, options in ways.items()}  # type: ignore[arg-type]

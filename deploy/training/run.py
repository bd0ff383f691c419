"""Entry points of ``promprune demo-model --train`` and ``--score``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deploy.training.export import export
from deploy.training.scoring import check, held_out_scenes, load
from deploy.training.scoring import score as score_model
from deploy.training.trainer import CHECKPOINT, LOG, Trainer


def train(out: Path, *, minutes: float, device: str, seed: int, fresh: bool, tell: Callable[[str], None]) -> Path:
    """Train a model in a directory, or resume the training there, and export it to ``out/model``.

    Args:
        out: Directory of the training's own checkpoint and log.
        minutes: Total training time.
        device: "cpu" or "cuda".
        seed: Random seed of the weights and the scenes.
        fresh: Start over even if there is a checkpoint.
        tell: Called with lines of text on the progress.

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
        directory: Directory of the model.
        scenes: Number of scenes per kind.

    Returns:
        Number of tokens and how they are selected -> result of `scoring.score`.
    """
    model, held_out = load(directory), held_out_scenes(scenes, scenes)
    ways = {"full": {}, "random 64": {"keep": 64}, "uniform 64": {"keep": 64, "sampler": "uniform"}}
    return {way: score_model(model, held_out, **options) for way, options in ways.items()}  # type: ignore[arg-type]

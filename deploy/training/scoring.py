"""Scores the model on held-out scenes: accuracy, and whether its class token attends to the things."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy.training.data import PATCHES, as_tensors
from deploy.training.forward import encode_patches, normalize_patches, predict
from deploy.training.samples import TASK_IDS, sample
from promprune_vllm.demo.scenes import TASKS, Scene, make_scene

MACRO, SALIENCY = "macro", "saliency AUC"
SALIENCY_DIGITS = "saliency AUC, of plates the digits"
_BATCH = 10
_TASK_NAMES = list(TASK_IDS)


def held_out_scenes(scattered: int, concentrated: int, first_seed: int = 0) -> list[Scene]:
    """Return scenes of both kinds, with consecutive seeds from `first_seed`."""
    numbers = {"scattered": scattered, "concentrated": concentrated}
    return [make_scene(kind, first_seed + i) for kind, number in numbers.items() for i in range(number)]


@torch.inference_mode()
def score(model: Any, scenes: list[Scene], *, keep: int = PATCHES, sampler: str = "random") -> dict[str, float]:
    """Answer every question about some scenes.

    Args:
        model: A `LlavaForConditionalGeneration`.
        scenes: Scenes to ask about.
        keep: Number of visual tokens to keep; they are selected after the tower, as in a server.
        sampler: "random", or "uniform" for evenly spaced tokens.

    Returns:
        Percent correct by task, and their mean, `MACRO`; `SALIENCY`, the area under the ROC curve of the class
        token's attention against the patches with a thing, averaged over scenes; `SALIENCY_DIGITS`, the same if
        the empty face of a plate counts as background.
    """
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    areas: dict[str, list[float]] = {SALIENCY: [], SALIENCY_DIGITS: []}
    device = model.device
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, len(scenes), _BATCH):
        some = scenes[begin : begin + _BATCH]
        columns = [as_tensors(sample(scene)) for scene in some]
        patches = torch.stack([column["patches"] for column in columns]).to(device)
        text = torch.stack([column["text"] for column in columns]).to(device)
        hidden, attention = _encode(model.model.vision_tower, patches)
        for row, scene in zip(attention.cpu().numpy(), some, strict=True):
            areas[SALIENCY].append(_area(row, scene.mask().ravel()))
            areas[SALIENCY_DIGITS].append(_area(row, scene.mask(faces=False).ravel()))
        images = model.model.multi_modal_projector(hidden[:, 1:])
        rows = _choose(len(some), keep, sampler, generator).to(device)
        images = images.gather(1, rows[..., None].expand(-1, -1, images.shape[-1]))
        good = predict(model, [images], text).argmax(-1) == text[:, 3]
        for task, hit in zip(text[:, 4].flatten().tolist(), good.flatten().tolist(), strict=True):
            if task >= 0:
                asked[_TASK_NAMES[task]] += 1
                right[_TASK_NAMES[task]] += hit
    scores = {task: 100 * right[task] / asked[task] for task in TASKS if asked[task]}
    saliency = {name: float(np.mean(each)) for name, each in areas.items()}
    return scores | {MACRO: float(np.mean(list(scores.values())))} | saliency


def check(model: Any) -> dict[str, float]:
    """Score a model during training on 60 held-out scenes with seeds from one million."""
    return score(model, held_out_scenes(40, 20, first_seed=10**6))


def _encode(tower: Any, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tower's features `(B, 577, Dv)`, and the class attention of its last used layer `(B, 576)`."""
    captured: list[Tensor] = []
    layer = tower.encoder.layers[-2]
    hook = layer.self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: captured.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    indices = torch.arange(PATCHES, device=patches.device).expand(len(patches), -1)
    try:
        hidden = encode_patches(tower, normalize_patches(patches, indices), indices)
    finally:
        hook.remove()
    attend = layer.self_attn
    (normed,) = captured
    heads = tower.config.num_attention_heads
    query = attend.q_proj(normed[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = attend.k_proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return hidden, weights.mean(1)[:, 0, 1:]


def _choose(rows: int, keep: int, sampler: str, generator: torch.Generator) -> Tensor:
    if sampler == "random":
        scores = torch.rand(rows, PATCHES, generator=generator)
        return scores.topk(keep, dim=1).indices.sort(dim=1).values
    return ((torch.arange(keep) + 0.5) * (PATCHES / keep)).long().expand(rows, -1)


def _area(score: Any, truth: Any) -> float:
    """Return the area under the ROC curve; 0.5 if all patches or none have a thing."""
    positives = int(truth.sum())
    if positives in (0, len(truth)):
        return 0.5
    ranks = np.empty(len(score))
    ranks[np.argsort(score, kind="stable")] = np.arange(1, len(score) + 1)
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (len(truth) - positives)))


def load(directory: Path) -> Any:
    """Load an exported model in float32."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()

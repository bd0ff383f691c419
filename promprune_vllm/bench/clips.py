"""``promprune eval --clips``: which events of drawn clips survive pruning, by method and budget.

No model answers: none that is small enough to ship can watch a video. What is measured is whether the tokens that
show an event are kept. The tokens are those of the trained demo model's vision tower, frame by frame, averaged two
by two as video models do: 12 x 12 of each frame. Selection is the server's code.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from promprune_vllm.bench.provenance import provenance
from promprune_vllm.core.budget import Budget
from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.registry import Selector, get_method, methods
from promprune_vllm.demo.scenes.clips import CLIP_KINDS, FRAMES, SceneClip, make_clip
from promprune_vllm.demo.scenes.record import GRID
from promprune_vllm.demo.trained import TRAINED
from promprune_vllm.engine.keys import CALIBRATION
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens

POOL = 2
SIDE = GRID // POOL
TOKENS = FRAMES * SIDE * SIDE

Masks = Sequence[Mapping[int, NDArray[np.bool_]]]
"""For each event, its tokens in each of its frames, ``(h, w)``."""


class Kept(NamedTuple):
    """What a method kept of one clip: each from 0 to 1.

    Args:
        some: 1 if of every event at least one token is kept, in one of its frames.
        half: 1 if of every event at least half of the tokens of one of its frames are kept.
        first: Share of the kept tokens that are of the first frame.
        largest: Share of the kept tokens that are of the frame that keeps most.
    """

    some: float
    half: float
    first: float
    largest: float


def measure(
    clips: int,
    names: Sequence[str],
    budgets: Sequence[Budget],
    advance: Callable[[], None],
    split: str = "held-out",
) -> dict[str, Any]:
    """Encode clips, prune them, and return what is left of their events.

    Args:
        clips: Clips of each kind, with seeds 0, 1, 2, ...
        names: Methods.
        budgets: Budgets of a clip of ``TOKENS`` tokens.
        advance: Called after each clip.
        split: Split of the clips' digits and photographs; see ``make_clip``.
    """
    where = provenance()  # of the code that runs, whatever is committed meanwhile
    selectors = [_calibrated(name) for name in names]
    keeps = [budget.of(TOKENS, FRAMES) for budget in budgets]
    found: dict[tuple[str, int, str], list[Kept]] = {}
    for clip, features in encoded(make_clip(kind, seed, split) for seed in range(clips) for kind in CLIP_KINDS):
        masks = pooled(clip)
        for selector in selectors:
            for keep in keeps:
                kept = kept_tokens(features, keep, selector)
                found.setdefault((selector.name, keep, clip.kind), []).append(judge(kept, masks))
        advance()
    rows = [
        {"method": method, "kept": keep, "kind": kind, "clips": len(each)}
        | {f"{field}": _mean_and_error([getattr(kept, field) for kept in each]) for field in Kept._fields}
        for (method, keep, kind), each in found.items()
    ]
    return {"kind": "clips", "tokens": TOKENS, "frames": FRAMES, "split": split, "rows": rows} | where


def kept_tokens(features: VisionFeatures, keep: int, selector: Selector) -> Tensor:
    """Return the kept tokens of a clip, ``(T, h, w)`` bool, selected as a server does."""
    selected = select_tokens(EncodedImage.of_frames(features.projected, features), keep, selector)
    _, positions = selected.rows(lambda rows: rows)
    return torch.zeros(features.tokens, dtype=torch.bool).index_fill_(0, positions, True).reshape(features.grid)


def pooled(clip: SceneClip) -> Masks:
    """Return the tokens of each event in each of its frames, ``(h, w)``: those with a patch of it."""
    return [
        {frame: np.any(mask.reshape(SIDE, POOL, SIDE, POOL), axis=(1, 3)) for frame, mask in event.items()}
        for event in clip.masks()
    ]


def judge(kept: Tensor, masks: Masks) -> Kept:
    """Return what is kept of a clip's events; ``kept`` is ``(T, h, w)`` bool."""
    of_events = [
        [(int(kept[frame][torch.from_numpy(mask)].sum()), int(mask.sum())) for frame, mask in event.items()]
        for event in masks
    ]
    per_frame = kept.flatten(1).sum(dim=1)
    total = int(per_frame.sum())
    return Kept(
        some=float(all(any(k > 0 for k, _ in frames) for frames in of_events)),
        half=float(all(any(2 * k >= n for k, n in frames) for frames in of_events)),
        first=int(per_frame[0]) / total,
        largest=int(per_frame.amax()) / total,
    )


def encoded(clips: Iterator[SceneClip]) -> Iterator[tuple[SceneClip, VisionFeatures]]:
    """Yield clips with their tokens: projected, before the projector, and the class token's attention."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(
        TRAINED, attn_implementation="eager", dtype=torch.float32
    ).eval()
    processor = AutoProcessor.from_pretrained(TRAINED).image_processor
    layer = model.config.vision_feature_layer
    for clip in clips:
        with torch.inference_mode():
            pixels = processor(images=list(clip.frames()), return_tensors="pt")["pixel_values"]
            tower = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
            encoder = tower.hidden_states[layer][:, 1:]  # (T, 576, Dv)
            saliency = tower.attentions[layer][:, :, 0, 1:].mean(dim=1)  # (T, 576)
            values = (model.model.multi_modal_projector(encoder), encoder, saliency[..., None])
            projected, encoder, saliency = (_pool(each) for each in values)
        grid = (FRAMES, SIDE, SIDE)
        yield clip, VisionFeatures(projected=projected, grid=grid, saliency=saliency[:, 0], encoder=encoder)


def _pool(values: Tensor) -> Tensor:
    """Return the mean of two by two patches, ``(T, 576, D)`` to ``(T * 144, D)``."""
    grid = values.reshape(len(values), SIDE, POOL, SIDE, POOL, -1)
    return grid.mean(dim=(2, 4)).flatten(0, 2).clone()


def _calibrated(name: str) -> Selector:
    options = json.loads((TRAINED / "config.json").read_text(encoding="utf-8")).get(CALIBRATION, {})
    method = methods().get(name)
    return get_method(name, **({} if method is None else options.get(method.calibrated_as, {})))


def _mean_and_error(values: Sequence[float]) -> list[float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return [round(statistics.fmean(values), 4), round(error, 4)]

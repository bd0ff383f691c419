"""``promprune bench content``: is a content-adaptive budget better than a fixed one with the same mean?

No model answers here; the figure is coverage: for each visual token, 1 - its largest cosine to a kept token (0 for
a kept token), averaged over the image. The features come from the demo model with random weights, so they say
little about real towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from promprune_vllm.bench.provenance import provenance
from promprune_vllm.core.budget import Budget
from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.core.select import select
from promprune_vllm.demo.images import photographs, synthetic
from promprune_vllm.demo.model import find_or_build_demo_model

DEFAULTS = (576, 288, 144)


def measure(method: str) -> dict[str, Any]:
    """Compare adaptive and fixed budgets of the same mean on photographs, and on all images.

    Args:
        method: Method that selects the tokens.
    """
    from promprune_vllm.engine.api_server import image_complexity

    groups = {"photographs": photographs()}
    groups["all"] = groups["photographs"] | synthetic()
    features = _features(groups["all"])
    levels = {name: image_complexity.level(image) for name, image in groups["all"].items()}
    rows = []
    for default in DEFAULTS:
        policy = BudgetPolicy(default=Budget(tokens=default))
        adapted = {name: policy.resolve(None, each.tokens, levels[name]) for name, each in features.items()}
        for group, images in groups.items():
            mean = round(sum(adapted[name] for name in images) / len(images))
            errors = [
                (
                    coverage_error(features[name], adapted[name], method),
                    coverage_error(features[name], mean, method),
                )
                for name in images
            ]
            adaptive, fixed = (sum(each) / len(errors) for each in zip(*errors, strict=True))
            rows.append(
                {
                    "images": group,
                    "count": len(images),
                    "default": default,
                    "mean_kept": mean,
                    "adaptive_error": round(adaptive, 4),
                    "fixed_error": round(fixed, 4),
                    "adaptive_over_fixed": round(adaptive / fixed, 3) if fixed else None,
                    "images_better": sum(a < f for a, f in errors),
                    "images_worse": sum(a > f for a, f in errors),
                }
            )
    shown = {name: float(level) for name, level in levels.items()}
    return {"kind": "content", "method": method, "levels": shown, "rows": rows, "provenance": provenance()}


def coverage_error(features: VisionFeatures, keep: int, method: str) -> float:
    """Return the mean, over all tokens, of 1 - the largest cosine to a kept token.

    Args:
        features: ``(N, D)`` tokens of one image.
        keep: Number of tokens to keep.
        method: Method that selects them.
    """
    kept = select(features, keep, method=method).indices  # (K,)
    rows = torch.nn.functional.normalize(features.projected.double(), dim=1)  # (N, D)
    nearest = (rows @ rows[kept].T).amax(1)  # (N,)
    nearest[kept] = 1.0
    return float((1 - nearest).mean())


def table(document: dict[str, Any]) -> Table:
    """Return the figures as a table for the terminal."""
    shown = Table(title=f"Coverage error, method {document['method']}", title_justify="left")
    for name in ("images", "default", "mean kept", "adaptive", "fixed", "adaptive/fixed", "better", "worse"):
        shown.add_column(name, justify="left" if name == "images" else "right")
    for row in document["rows"]:
        names = ("default", "mean_kept", "adaptive_error", "fixed_error", "adaptive_over_fixed")
        counts = (row["images_better"], row["images_worse"])
        shown.add_row(f"{row['images']} ({row['count']})", *(str(row[name]) for name in names), *map(str, counts))
    return shown


def _features(images: Mapping[str, Image.Image]) -> dict[str, VisionFeatures]:
    """Encode images with the demo model: projected tokens, and the class token's attention as saliency."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    directory = find_or_build_demo_model()
    model: Any = LlavaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(directory).image_processor
    layer = model.config.vision_feature_layer
    features = {}
    with torch.inference_mode():
        for name, image in images.items():
            pixels = processor(images=image, return_tensors="pt")["pixel_values"]  # (1, 3, H, W)
            tower = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
            projected = model.model.multi_modal_projector(tower.hidden_states[layer][:, 1:])[0]  # (N, D)
            saliency = tower.attentions[layer][0, :, 0, 1:].mean(0)  # (N,)
            side = round(len(projected) ** 0.5)
            features[name] = VisionFeatures(projected=projected, grid=(1, side, side), saliency=saliency)
    return features

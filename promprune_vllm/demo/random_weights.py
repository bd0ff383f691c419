"""Seeded random weights with the names, shapes and layout of published checkpoints.

A weight depends only on the seed, its published name and its shape: the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from promprune_vllm.demo import processing

if TYPE_CHECKING:
    import torch

DType = Literal["float32", "bfloat16"]

# transformers 5 names -> names in published checkpoints, by model type; other types keep their names. vLLM
# requires `vision_model`, which save_pretrained leaves out; transformers reads both.
_LLAVA_NAMES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_QWEN2_NAMES = (("model.visual.", "visual."), ("model.language_model.", "model."), ("lm_head.", "lm_head."))
_CHECKPOINT_NAMES = {
    "llava": _LLAVA_NAMES,
    "llava_next": _LLAVA_NAMES,
    "llava_onevision": _LLAVA_NAMES,
    "llava_next_video": _LLAVA_NAMES,
    "internvl": (("model.vision_tower.", "vision_tower."), *_LLAVA_NAMES[1:]),
    "qwen2_vl": _QWEN2_NAMES,
    "qwen2_5_vl": _QWEN2_NAMES,
}

# Standard deviation of a weight: the first pattern that matches its name applies. Gains are divided by
# sqrt(fan_in), so that models of any size behave alike. They were tuned on photographs. The usual 0.02 makes all
# attention uniform; these make the class token favor some patches (the first 64 get about half of its attention)
# and put the normalized spectral entropy of the photos on both sides of PromPrune's mu = 0.42.
_STD = (
    (r"class_embedding$|cls_token$|embed_tokens\.weight$|lambda_[12]$", 1.0),
    (r"(position_embedding|pos_embed)\.weight$|position_embeddings$", 0.1),
    (r"\.bias$|e_score_correction_bias$", 0.05),
)
_GAIN = (
    (r"vision_tower\..*\.[qk]_proj\.weight$|visual\..*\.qkv\.weight$", 2.0),
    (r"visual\..*\.attn\.proj\.weight$", 0.25),  # undoes the gain of the values, which are in qkv too
    (r"\.(o_proj|out_proj|down_proj|fc2|projection_layer)\.weight$", 0.5),
    (r"", 1.0),
)


def random_weights(model_class: Any, config: Any, seed: int, dtype: DType) -> dict[str, torch.Tensor]:
    """Return all weights of a model by published name; the model itself is built on the meta device only."""
    import torch

    with torch.device("meta"):
        model = model_class(config)
    weights = {}
    for ours, parameter in model.state_dict().items():
        for name, shape in _published(ours, tuple(parameter.shape), config.model_type):
            weight = _random_weight(name, shape, seed).to(getattr(torch, dtype))
            # Published experts are (E, in, out); transformers transposes them when it loads them.
            transposed = config.model_type == "qwen3_vl_moe" and ".experts." in name
            weights[name] = weight.transpose(1, 2).contiguous() if transposed else weight
    return weights


def checkpoint_name(name: str, model_type: str) -> str:
    """Return the name of a transformers parameter in published checkpoints."""
    for ours, published in _CHECKPOINT_NAMES.get(model_type, (("", ""),)):
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f"there is no checkpoint name for the parameter {name}")


def _published(name: str, shape: tuple[int, ...], model_type: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the published names and shapes of what is one parameter in transformers."""
    name = checkpoint_name(name, model_type)
    if model_type != "glm4v_moe" or ".experts." not in name:
        yield name, shape
        return
    # transformers stacks GLM's experts, and their two input projections, when it loads them.
    parent, _, fused = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
    experts, rows, columns = shape
    for expert in range(experts):
        for part in parts:
            yield f"{parent}.{expert}.{part}.weight", (rows // len(parts), columns)


def _random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the weight `name` of this seed in float32; it does not depend on the model's other weights."""
    import torch

    if re.search(r"(norm\w*|ln_q)\.weight$", name):
        return torch.ones(shape)
    std = next((std for pattern, std in _STD if re.search(pattern, name)), None)
    if std is None:
        gain = next(gain for pattern, gain in _GAIN if re.search(pattern, name))
        std = gain / math.sqrt(math.prod(shape[1:]))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    # Uniform, not normal: the last bits of torch.randn depend on the CPU, those of torch.rand do not.
    weight = (torch.rand(shape, generator=generator) - 0.5) * (std * math.sqrt(12.0))
    if name.endswith("lm_head.weight"):
        # 0 is below the largest of 95 random logits, so greedy answers are printable and never end early.
        weight[processing.unprintable_ids()] = 0.0
    return weight

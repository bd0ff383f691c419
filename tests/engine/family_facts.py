"""What the tests must know of each model family and cannot read from its model: one row per family.

A new family is one more row. What vLLM or the configuration tells (placeholders, the tower's name, M-RoPE, sizes)
has no column here: ``FamilyEngine`` asks for it. No other file of the contract suite may name a family
(``tests/unit/test_contract_suite.py``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from promprune_vllm.demo.families import serving_dtype
from promprune_vllm.engine.compat import versions
from tests.engine import saliency_references as saliency

if TYPE_CHECKING:
    from tests.engine.family_engine import FamilyEngine

Inputs = Callable[[str, Sequence[Image.Image], Mapping[str, Any]], dict[str, Tensor]]
"""(checkpoint, images, options of the image processor) -> the tensors of vLLM's ``embed_multimodal``, by name."""
Saliency = Callable[["FamilyEngine", str], saliency.PerGroup]
"""(engine, shape of an image) -> saliency of each group of tokens, ``(N,)``; and that of a layer that is wrong."""


@dataclass(frozen=True)
class FamilyFacts:
    """One family.

    Args:
        inputs: Makes the inputs of images without vLLM.
        saliency: The saliency according to transformers.
        mu: PromPrune's calibration, in force where neither the operator nor the checkpoint has one.
        views: How many times an image's tokens see its area, at least and at most.
        projector: The module that gets what the encoder returns, where vLLM counts it as part of the tower or does
            not name it.
        mrope: Whether positions are M-RoPE's; for lists of parameters, made before there is an engine to ask.
        options: Further options of vLLM's engine, without which the family cannot be served.
        variant: Whether all of its code is another family's, which has another language model.
        first_minor: The first minor of vLLM that can load the family on a CPU, if older ones are supported.
    """

    inputs: Inputs
    saliency: Saliency
    mu: float
    views: tuple[float, float] = (1, 1)
    projector: str | None = None
    mrope: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    variant: bool = False
    first_minor: str | None = None

    @property
    def tiled(self) -> bool:
        """Whether an image is cut into tiles, each pruned by itself."""
        return self.views[1] > 1

    @property
    def loadable(self) -> bool:
        return self.first_minor is None or not versions.before(self.first_minor)


def image_processor(*tensors: str, **always: Any) -> Inputs:
    """Inputs from the checkpoint's own Hugging Face image processor.

    Args:
        tensors: Names of the tensors; ``"ours=theirs"`` where vLLM has another name than the processor.
        always: Options that the checkpoint's Hugging Face processor sets for its image processor.
    """

    def make(checkpoint: str, images: Sequence[Image.Image], options: Mapping[str, Any]) -> dict[str, Tensor]:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(checkpoint).image_processor
        made = processor(images=list(images), return_tensors="pt", **always, **options)
        names = [name.partition("=") for name in tensors]
        return {ours: made[theirs or ours] for ours, _, theirs in names}

    return make


def chat_tiles(checkpoint: str, images: Sequence[Image.Image], _: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of InternVL's original layout: transformers has no processor for it, vLLM has one of its own."""
    from vllm.transformers_utils.processors import internvl

    before = getattr(internvl, "InternVLImageProcessor", None)  # its name until vLLM 0.32
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail")
    processor = (before or internvl.InternVLChatImageProcessor)(
        config["force_image_size"], *(config[name] for name in names)
    )
    return dict(processor(list(images), return_tensors="pt"))


_TILES_AND_WHOLE = (1, 2)  # a small image is one tile
_PATCHES = FamilyFacts(
    inputs=image_processor("pixel_values", "image_grid_thw"),
    saliency=saliency.received_by_patches,
    mu=0.5744,
    mrope=True,
)
_QWEN3_VL = replace(_PATCHES, first_minor="0.30")
_GLM = replace(_PATCHES, projector="visual.downsample")  # a convolution before what vLLM calls the connector
FACTS: Mapping[str, FamilyFacts] = MappingProxyType(
    {
        "llava_next": FamilyFacts(
            inputs=image_processor("pixel_values", "image_sizes"),
            saliency=saliency.paid_by_cls,
            mu=0.42,
            # The whole image, then crops of it without the patches at the edge that are half padding.
            views=(1.85, 2),
        ),
        "llava_onevision": FamilyFacts(
            inputs=image_processor("pixel_values", "image_sizes"),
            saliency=saliency.received_in_tiles,
            mu=0.42,
            views=(1.75, 2),  # the same; a tile has five patches along each side
            projector="multi_modal_projector",
        ),
        "internvl": FamilyFacts(
            inputs=image_processor("pixel_values", "image_num_patches=num_patches", crop_to_patches=True),
            saliency=saliency.paid_by_cls_to_squares,
            mu=0.42,
            views=_TILES_AND_WHOLE,
        ),
        "internvl_chat": FamilyFacts(
            inputs=chat_tiles,
            saliency=saliency.paid_by_cls_to_squares,
            mu=0.42,
            views=_TILES_AND_WHOLE,
            options=MappingProxyType({"trust_remote_code": True}),
        ),
        "qwen2_vl": _PATCHES,
        "qwen2_5_vl": replace(_PATCHES, saliency=saliency.received_in_window_order),
        "qwen3_vl": _QWEN3_VL,
        "qwen3_vl_moe": replace(_QWEN3_VL, variant=True),
        "qwen3_5": _PATCHES,
        "qwen3_5_moe": replace(_PATCHES, variant=True),
        "glm4v": _GLM,
        "glm4v_moe": replace(_GLM, variant=True),
        "glm_ocr": replace(_GLM, variant=True),
    }
)
VARIABLE = "PROMPRUNE_TEST_FAMILIES"
"""``few``: three families; ``others``: those that `make test` leaves out; ``all``: all of them."""
_OF_EACH_KIND = ("llava_next", "llava_onevision", "internvl_chat", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
"""One of each tower, layout and kind of positions: the others share code with them."""
_FEW = ("llava_next", "qwen2_5_vl", "qwen3_vl")
"""Tiles, M-RoPE, and channels of DeepStack: what a model runner handles differently."""
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "few": _FEW,
    "": _OF_EACH_KIND,
    "all": tuple(FACTS),
    "others": tuple(family for family in FACTS if family not in _OF_EACH_KIND),
}
FAMILIES = _CHOICES[os.environ.get(VARIABLE, "")]
KINDS = tuple(family for family in FAMILIES if not FACTS[family].variant)
"""Those with code of their own. What variants share with them is tested with them."""
VARIANTS = tuple(family for family, facts in FACTS.items() if facts.variant)
CROPPED_FRAMES = ("llava_next_video",)
"""Families whose processor cuts the middle out of a frame; the others resize all of it."""
VIDEO_ONLY = ("llava_next_video",)
"""Those that take no images."""
_LAYOUTS = ("qwen2_5_vl", "qwen3_vl", "glm4v", "internvl_chat", "llava_onevision", *VIDEO_ONLY)
VIDEO_LAYOUTS = tuple(f for f in (*FAMILIES, *VIDEO_ONLY) if f in _LAYOUTS)
"""One of each way to put a video in a prompt, with M-RoPE and without: one run, or a run per frame."""
OWN_TESTS = ("llava", *VIDEO_ONLY)  # test_llava.py, with the demo model; test_llava_video.py
TILED = tuple(family for family, facts in FACTS.items() if facts.tiled)
UNLOADABLE = tuple(family for family, facts in FACTS.items() if not facts.loadable)


def engine_options(family: str) -> dict[str, Any]:
    """Options of vLLM's engine with which a demo model is served exactly; LLaVA-1.5 has no row, and needs none."""
    return {"dtype": serving_dtype(family), **(FACTS[family].options if family in FACTS else {})}

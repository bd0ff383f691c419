"""An in-process engine for any model family, and an oracle for what it should hand to its language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from promprune_vllm import Need, methods
from promprune_vllm.core.features import OF_TOWER
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.processing import IMAGE_ID
from promprune_vllm.engine.keys import TRACES_METHOD
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.selected_tokens import select_tokens
from tests import runner
from tests.clips import Clip
from tests.engine.conftest import SHARED, Engine
from tests.engine.family_facts import FACTS, UNLOADABLE, FamilyFacts, engine_options

EVERYTHING = Need.PROJECTED | OF_TOWER
# Landscape, portrait, square, and one smaller than a tower's own size.
SHAPES = {"landscape": (360, 220), "portrait": (180, 330), "square": (224, 224), "tiny": (40, 30)}
Visual = tuple[str, int | None]  # (shape, budget)


@cache
def picture(shape: str) -> Image.Image:
    """A real photograph, cut to a shape."""
    name = {"landscape": "coffee", "portrait": "rocket", "square": "astronaut", "tiny": "chelsea"}[shape]
    width, height = SHAPES[shape]
    with Image.open(photo_path(name)) as image:
        return image.convert("RGB").resize((width, height))


@dataclass
class Fed:
    """What the language model was given, step by step."""

    embeds: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    deepstack: list[torch.Tensor] = field(default_factory=list)
    tower_calls: int = 0


class FamilyEngine(Engine):
    """vLLM with the tiny model of one family."""

    def __init__(self, family: str, model: Path, **options: Any) -> None:
        self.family = family
        if family in UNLOADABLE:
            pytest.skip("this minor of vLLM cannot load the family on a CPU, with or without us")
        sizes = {"max_model_len": 1920, "num_gpu_blocks_override": 64}
        super().__init__(model, **{**engine_options(family), **sizes, **options})

    @property
    def facts(self) -> FamilyFacts:
        return FACTS[self.family]

    @property
    def mrope(self) -> bool:
        return bool(self.llm.model_config.uses_mrope)

    @property
    def towers(self) -> dict[str, torch.nn.Module]:
        """The vision tower, and what projects its output: modules by name, one may be within another."""
        if hasattr(self.model, "get_mm_mapping"):
            mapping = self.model.get_mm_mapping()
            names = [name.rstrip(".") for name in (*mapping.tower_model, *mapping.connector)]
        else:  # a model that vLLM loads no adapters for tells no names of parts
            names = [name for name, _ in self.model.named_children() if name in self.model._tower_model_names]
        return {name: self.model.get_submodule(name) for name in names}

    @property
    def tower(self) -> torch.nn.Module:
        return next(iter(self.towers.values()))

    @property
    def processor(self) -> Any:
        """vLLM's processor of prompts with images, or ours in its place."""
        return self.llm.llm_engine.input_processor.renderer.mm_processor

    @property
    def modalities(self) -> set[str]:
        """What the model takes besides text."""
        return set(self.processor.info.get_supported_mm_limits())

    @property
    def block(self) -> int:
        """Tokens of a block of the KV cache."""
        return int(self.llm.llm_engine.vllm_config.cache_config.block_size)

    def ask(
        self,
        *media: str | Clip,
        budget: object = None,
        method: str | None = None,
        before: str = "",
        text: str = "What?",
    ) -> dict[str, Any]:
        """A prompt with images of these shapes and with clips, text before, between and after them.

        A family that takes no images gets the clips, and the budgets in a list that are theirs.
        """
        if "image" not in self.modalities:
            if isinstance(budget, list):
                pairs = zip(media, budget, strict=True)
                budget = [each for medium, each in pairs if isinstance(medium, Clip)]
            media = tuple(medium for medium in media if isinstance(medium, Clip))
        items: dict[str, list[Any]] = {}
        between = ""
        for i, medium in enumerate(media):
            kind, item = ("video", medium.item) if isinstance(medium, Clip) else ("image", picture(medium))
            items.setdefault(kind, []).append(item)
            between += f"{before}{type(self.model).get_placeholder_str(kind, 1)}{i}. "
        prompt: dict[str, Any] = {"prompt": f"{between}{text}"}
        if items:
            prompt["multi_modal_data"] = items
        if budget is not None:
            prompt["mm_processor_kwargs"] = {"visual_token_budget": budget}
        if method is not None:
            prompt.setdefault("mm_processor_kwargs", {})["visual_token_method"] = method
        return prompt

    @contextmanager
    def fed(self) -> Iterator[Fed]:
        fed = Fed()

        def before_model(model: Any, _: Any, kwargs: dict[str, Any]) -> None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None:
                return
            fed.embeds.append(embeds.clone())
            fed.positions.append(kwargs["positions"].clone())
            if getattr(model, "deepstack_num_level", 0):
                levels = torch.stack([level[: len(embeds)] for level in model.deepstack_input_embeds])
                fed.deepstack.append(levels.clone())

        def before_tower(*_: Any) -> None:
            fed.tower_calls += 1

        handles = [
            self.model.register_forward_pre_hook(before_model, with_kwargs=True),
            self.tower.register_forward_pre_hook(before_tower),
        ]
        try:
            yield fed
        finally:
            for handle in handles:
                handle.remove()

    def inputs(self, *shapes: str | Image.Image, raw: bool = True) -> dict[str, Any]:
        """What the Hugging Face processor makes of images: as vLLM hands them to the model, or normalised."""
        # vLLM hands raw pixels to the Qwen towers, and normalises them there: to Qwen3-VL's since 0.32.
        raw = raw and self.llm.model_config.multimodal_config.mm_device_do_normalize
        options = {"do_normalize": False, "do_rescale": False} if raw else {}
        images = [picture(shape) if isinstance(shape, str) else shape for shape in shapes]
        return self.facts.inputs(self.llm.model_config.model, images, options)

    def give_encoder_graphs(self, patch: pytest.MonkeyPatch) -> Any:
        """Put vLLM's own manager of the encoder's graphs in: no graph fits, and it encodes without."""
        from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

        config, device = self.llm.llm_engine.vllm_config, next(self.tower.parameters()).device
        graphs = EncoderCudaGraphManager(config, device, config.model_config.dtype, self.model)
        patch.setattr(graphs, "_find_smallest_fitting_budget_given_tokens", lambda *_: None)
        patch.setattr(graphs, "is_captured", lambda: True)
        encoder = getattr(getattr(self.runner, "model_state", None), "encoder_runner", None)  # of Model Runner V2
        if encoder is None:
            patch.setattr(self.runner, "encoder_cudagraph_manager", graphs)
        else:
            patch.setattr(encoder, "cudagraph_manager", graphs)
        return graphs

    @torch.inference_mode()
    def encoded(self, shape: str | Image.Image) -> EncodedImage:
        """One image with everything a method may look at."""
        (image,) = self.model.capture(self.inputs(shape), slice(0, 1), EVERYTHING)
        return image

    def boxes(self, shape: str) -> list[tuple[float, ...] | None]:
        """Where each token of an image looks, as the server tells it."""
        boxes: list[tuple[float, ...] | None] = self.processor.boxes(*SHAPES[shape])
        return boxes

    def prompt_positions(self, length: int) -> torch.Tensor:
        """``(3, length)`` positions that the runner holds for the prompt of its one request."""
        if runner.is_v2():
            (index,) = self.runner.req_states.req_id_to_index.values()
            positions = self.runner.model_state.rope_state.read_prefill_positions(index, length)
        else:
            (state,) = self.runner.requests.values()
            positions = state.mrope_positions[:, :length]
        return torch.as_tensor(positions).long().clone()

    def told(self) -> list[dict[str, Any] | None]:
        """What the worker tells of the images in its encoder cache."""
        (told,) = self.core.model_executor.collective_rpc(TRACES_METHOD, args=(list(self.rows()),))
        return list(told)

    def tokens(self, shape: str) -> int:
        return len(self.encoded(shape).rows)

    @torch.inference_mode()
    def kept(self, shape: str, budget: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that must enter the language model for an image, and their places among all of its tokens."""
        image = self.encoded(shape)
        if budget is None or budget >= len(image.rows):
            return image.rows, torch.arange(len(image.rows))
        return select_tokens(image, budget, self.model._methods[0]).rows(self.model.project)

    def true_positions(self, prompt: Sequence[int], visuals: Sequence[Visual], later: int) -> torch.Tensor:
        """Positions of a pruned prompt and what is generated: ``(L + later,)``, or with M-RoPE ``(3, L + later)``.

        M-RoPE's are those of the unpruned prompt, written from the definition: text advances by one in all three;
        a cell of an image has its own row and column, counted from where the image starts; what follows starts
        behind the image's longer side. Others are consecutive over the kept tokens.
        """
        if not self.mrope:
            return torch.arange(len(prompt) + later)
        columns: list[torch.Tensor] = []
        start, at, images = 0, 0, list(visuals)
        while at < len(prompt):
            if prompt[at] != IMAGE_ID:
                columns.append(torch.full((3, 1), start))
                start, at = start + 1, at + 1
                continue
            shape, budget = images.pop(0)
            _, height, width = self.encoded(shape).groups[0].features.grid
            _, places = self.kept(shape, budget)
            cells = torch.stack([torch.zeros_like(places), places // width, places % width])
            columns.append(cells + start)
            start, at = start + max(height, width), at + len(places)
        columns.append(torch.arange(start, start + later).expand(3, -1))
        return torch.cat(columns, dim=1)


FAMILY_ENGINES = "engines of the families"


def shared_engine(family: str, model: Path) -> FamilyEngine:
    """The engine of a family that several modules use; a request may choose any method."""

    def make() -> FamilyEngine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PROMPRUNE_ALLOW_METHODS", ",".join(methods()))
            return FamilyEngine(family, model)

    return SHARED.get(family, make)

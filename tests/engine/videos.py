"""What tests of videos ask of an engine: what images and videos keep, and what the model gets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from promprune_vllm import methods
from promprune_vllm.engine.keys import SUMMARY
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from tests.clips import Clip
from tests.engine.family_engine import EVERYTHING, FamilyEngine
from tests.engine.family_facts import KINDS, VIDEO_LAYOUTS, VIDEO_ONLY

METHODS = tuple(methods(over_frames=True))
"""Those that decide how many tokens each frame keeps."""
SPLITS = {"evenly": (Clip(40), 90, None), METHODS[-1]: (Clip(7, "tall"), 50, METHODS[-1])}
"""Clip, budget and method: each frame keeps equally many tokens, or as many as the method says."""
each_split = pytest.mark.parametrize(("clip", "budget", "method"), SPLITS.values(), ids=SPLITS)
each_layout = pytest.mark.parametrize("engine", VIDEO_LAYOUTS, indirect=True)
each_layout_with_images = pytest.mark.parametrize(
    "engine", [layout for layout in VIDEO_LAYOUTS if layout not in VIDEO_ONLY], indirect=True
)
each_kind = pytest.mark.parametrize("engine", [*KINDS, *VIDEO_ONLY], indirect=True)


@dataclass(frozen=True)
class Given:
    """What the language model was given of one prompt, behind what it took from the prefix cache.

    Args:
        tokens: All tokens of the prompt.
        rows: ``(L, W)``, with those of DeepStack beside them.
        positions: ``(P, L)``.
        cached: Tokens from the prefix cache.
        tower_calls: How often the vision tower was called.
    """

    tokens: list[int]
    rows: torch.Tensor
    positions: torch.Tensor
    cached: int
    tower_calls: int

    def __eq__(self, other: object) -> bool:
        """Whether all that both were given is the same, bit for bit."""
        assert isinstance(other, Given)
        later = max(self.cached, other.cached)
        pairs = [
            (each.rows[later - each.cached :], each.positions[:, later - each.cached :]) for each in (self, other)
        ]
        return self.tokens == other.tokens and all(map(torch.equal, *pairs))

    __hash__ = None


def given(engine: FamilyEngine, request: dict[str, Any], *, hot: bool = False) -> Given:
    """What the language model gets of a prompt: with every cache empty, unless hot."""
    if not hot:
        engine.forget()
    with engine.fed() as fed:
        (output,) = engine.generate([request], tokens=1)
    tokens = list(output.prompt_token_ids)
    length = len(tokens) - output.num_cached_tokens
    rows = torch.cat(fed.embeds)[:length]
    if fed.deepstack:
        rows = torch.cat([rows, *torch.cat(fed.deepstack, dim=1)[:, :length]], dim=1)
    positions = torch.cat(fed.positions, dim=-1)[..., :length].reshape(-1, length)
    return Given(tokens, rows, positions, output.num_cached_tokens, fed.tower_calls)


def where(some: Given, whole: Given, *, mrope: bool) -> list[int]:
    """Where a pruned prompt's rows are among the whole one's, one behind the other, with the same positions."""
    found, at = [], 0
    for i, row in enumerate(some.rows):
        while not (
            torch.equal(whole.rows[at], row)
            and (not mrope or torch.equal(whole.positions[:, at], some.positions[:, i]))
        ):
            at += 1
        found.append(at)
        at += 1
    return found


def rendered(engine: FamilyEngine, request: dict[str, Any]) -> dict[str, Any]:
    """A processed prompt."""
    (prompt,) = engine.llm.llm_engine.input_processor.renderer.render_cmpl([request])
    return dict(prompt)


def counted(engine: FamilyEngine, request: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Kind, tokens before and tokens after of each image and video, in order of appearance."""
    return [(each.kind, each.total, each.kept) for each in rendered(engine, request)[SUMMARY].images]


def place(prompt: dict[str, Any]) -> tuple[int, int]:
    """The first visual token of the one video of a processed prompt, and the one behind its last."""
    (found,) = prompt["mm_placeholders"]["video"]
    runs = found.extract_embeds_range()
    return runs[0][0], runs[-1][1] + 1


def check_it_is_part_of(whole: Given, engine: FamilyEngine, request: dict[str, Any]) -> Given:
    """A pruned prompt has some of the whole one's rows and positions, and lacks only as many as are pruned."""
    some = given(engine, request)
    dropped = sum(total - kept for _, total, kept in counted(engine, request))
    assert len(some.tokens) == len(whole.tokens) - dropped
    instead = embedded(rendered(engine, request))  # of a token, whose row says what it is
    for i, at in enumerate(where(some, whole, mrope=engine.mrope)):
        assert i in instead or some.tokens[i] == whole.tokens[at]
    return some


def embedded(prompt: dict[str, Any]) -> set[int]:
    """Where embeddings of images and videos are put in a processed prompt."""
    ranges = [place.extract_embeds_range() for places in prompt["mm_placeholders"].values() for place in places]
    return {i for runs in ranges for start, last in runs for i in range(start, last + 1)}


@torch.inference_mode()
def encoded(engine: FamilyEngine, clip: Clip) -> EncodedImage:
    """A clip with everything a method may look at, without what the processor says of a budget."""
    engine.forget()
    (item,) = rendered(engine, engine.ask(clip))["mm_kwargs"]["video"]
    fields = {name: value for name, value in item.items() if not name.startswith("visual_token")}
    inputs = {name: value.field.reduce_data([value]) for name, value in fields.items()}  # as vLLM makes a batch
    (video,) = engine.model.capture(inputs, slice(0, 1), EVERYTHING)
    return video

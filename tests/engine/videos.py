"""What tests of videos ask of an engine: what images and videos keep, and what the model gets of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from promprune_vllm.engine.keys import SUMMARY
from tests.engine.family_engine import FamilyEngine
from tests.engine.family_facts import VIDEO_LAYOUTS

each_layout = pytest.mark.parametrize("engine", VIDEO_LAYOUTS, indirect=True)


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

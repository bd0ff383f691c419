"""Videos with a budget: exact counts, the rows and positions that the language model gets, and caches.

What the language model gets of a pruned prompt must be some of what it gets of the whole one, row by row, bit for
bit, with the positions that the rows have there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from promprune_vllm.engine.keys import SUMMARY
from tests.clips import Clip
from tests.engine.family_engine import FAMILY_ENGINES, FamilyEngine
from tests.engine.test_families import each_kind, engine  # noqa: F401  a fixture

pytestmark = pytest.mark.engine
TOGETHER = FAMILY_ENGINES


@pytest.fixture(autouse=True)
def takes_videos(engine: FamilyEngine) -> None:  # noqa: F811
    if "video" not in engine.modalities:
        pytest.skip("the family takes no videos")
    engine.forget()


def counted(engine: FamilyEngine, request: Any) -> list[tuple[str, int, int]]:  # noqa: F811
    """Kind, tokens before and tokens after of each image and video, as the processor tells them."""
    renderer = engine.llm.llm_engine.input_processor.renderer
    (prompt,) = renderer.render_cmpl([request])
    return [(image.kind, image.total, image.kept) for image in prompt[SUMMARY].images]


def fed(engine: FamilyEngine, request: Any) -> tuple[list[int], torch.Tensor, torch.Tensor]:  # noqa: F811
    """The tokens of a prompt, and the rows ``(L, W)`` and positions ``(P, L)`` that the language model gets."""
    engine.forget()
    with engine.fed() as given:
        (output,) = engine.generate([request], tokens=1)
    tokens = list(output.prompt_token_ids)
    rows = torch.cat(given.embeds)[: len(tokens)]
    if given.deepstack:
        levels = torch.cat(given.deepstack, dim=1)[:, : len(tokens)]
        rows = torch.cat([rows, *levels], dim=1)
    return tokens, rows, torch.cat(given.positions, dim=-1)[..., : len(tokens)].reshape(-1, len(tokens))


def where(rows: torch.Tensor, positions: torch.Tensor, whole: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Where pruned rows are among those of the whole prompt, each behind the one before and with its position."""
    found, at = [], 0
    for row, position in zip(rows, positions.T, strict=True):
        while not (torch.equal(whole[at], row) and torch.equal(among[:, at], position)):
            at += 1
        found.append(at)
        at += 1
    return found


@each_kind
@pytest.mark.parametrize(
    ("frames", "shape"), [(2, "landscape"), (7, "landscape"), (7, "portrait"), (40, "portrait")]
)
def test_the_model_gets_exactly_k_of_the_rows_each_at_its_place(
    engine: FamilyEngine,  # noqa: F811
    frames: int,
    shape: str,
) -> None:
    media = ("tiny", Clip(frames, shape), "portrait")
    whole = engine.ask(*media)
    _, (_, total, _), _ = counted(engine, engine.ask(*media, budget=["full", "99%", "full"]))
    tokens, rows, positions = fed(engine, whole)
    if not engine.mrope:
        positions = torch.zeros_like(positions)
    for kept in {1, max(1, total // 5), total - 1}:
        request = engine.ask(*media, budget=["full", kept, "full"])
        assert counted(engine, request)[1] == ("video", total, kept)
        fewer, some_rows, some_positions = fed(engine, request)
        assert len(fewer) == len(tokens) - total + kept
        if not engine.mrope:
            some_positions = torch.zeros_like(some_positions)
        assert [tokens[i] for i in where(some_rows, some_positions, rows, positions)] == fewer

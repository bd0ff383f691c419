"""Speculative decoding beside pruned images: the tokens are those of the model, whoever drafts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runner
from tests.engine.draft_head import EAGLE, EAGLE3, build_draft_head
from tests.engine.family_engine import FamilyEngine

pytestmark = pytest.mark.engine
STEP = 48  # tokens: steps begin and end inside images
TOKENS = 24
BUDGETS = (None, 33, 7)
NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class Drafting:
    """An engine that verifies drafts, and what another one without them had answered."""

    engine: FamilyEngine
    expected: dict[int | None, list[list[int]]]


def asks(engine: FamilyEngine, budget: int | None) -> list[dict[str, Any]]:
    return [
        engine.ask("landscape", "portrait", budget=budget),
        engine.ask("square", budget=budget, text="Why is it so?"),
    ]


def answers(engine: FamilyEngine, budget: int | None) -> list[list[int]]:
    return [list(each.outputs[0].token_ids) for each in engine.generate(asks(engine, budget), tokens=TOKENS)]


def speculation(method: str, model: Path, head: Path, expected: list[list[int]]) -> dict[str, Any]:
    if method != NGRAM:
        following: dict[int, int] = {}
        for ids in expected:
            for token, after in pairwise(ids):
                following.setdefault(token, after)
        return {
            "method": method,
            "model": str(build_draft_head(method, model, head, following)),
            "num_speculative_tokens": 2,
        }
    # vLLM schedules ahead of the n-grams that it looks up on the device, and not of the others.
    name = "ngram_gpu" if runner.schedules_ahead() else NGRAM
    return {"method": name, "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.fixture(
    scope="module", params=[("llava", NGRAM), ("qwen2_5_vl", EAGLE), ("qwen3_vl", EAGLE3)], ids="-".join
)
def drafting(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drafting]:
    family, method = request.param
    model = models[family]
    without = FamilyEngine(family, model)
    expected = {budget: answers(without, budget) for budget in BUDGETS}
    without.close()
    head = tmp_path_factory.mktemp(family) / "head"
    config = speculation(method, model, head, [ids for each in expected.values() for ids in each])
    engine = FamilyEngine(
        family, model, speculative_config=config, max_num_batched_tokens=STEP, disable_log_stats=False
    )
    yield Drafting(engine, expected)
    engine.close()


def accepted(engine: FamilyEngine) -> int:
    (counter,) = (each for each in engine.llm.get_metrics() if each.name == "vllm:spec_decode_num_accepted_tokens")
    return int(counter.value)


@pytest.mark.parametrize("budget", BUDGETS)
def test_tokens_are_those_without_drafts_and_drafts_are_accepted(drafting: Drafting, budget: int | None) -> None:
    engine = drafting.engine
    engine.forget()
    before = accepted(engine)
    assert answers(engine, budget) == drafting.expected[budget]
    assert accepted(engine) > before


def test_positions_of_the_prompt_stay_true_beside_a_drafter(drafting: Drafting) -> None:
    """Runner V1 has the model write positions for the drafter's embeddings too, which are one token ahead."""
    engine = drafting.engine
    if not engine.mrope:
        pytest.skip("positions are counted anew over the kept tokens")
    engine.forget()
    from vllm import SamplingParams

    prompt = engine.ask("landscape", "portrait", budget=33)
    engine.llm.llm_engine.add_request("0", prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    found = None
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs = engine.llm.llm_engine.step()
        if outputs and found is None:
            ids = outputs[0].prompt_token_ids
            found = engine.prompt_positions(len(ids))
    assert found is not None
    assert torch.equal(found, engine.true_positions(ids, [("landscape", 33), ("portrait", 33)], later=0))

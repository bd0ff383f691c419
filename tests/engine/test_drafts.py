"""Speculative decoding beside pruned images: the tokens are those of the model, whoever drafts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from promprune_vllm import methods
from promprune_vllm.demo.families import serving_dtype
from promprune_vllm.engine.compat import versions
from tests import runner
from tests.engine.draft_head import EAGLE, EAGLE3, build_draft_head, build_with_mtp_head
from tests.engine.family_engine import FamilyEngine
from tests.engine.videos import METHODS, SPLITS

pytestmark = [pytest.mark.engine, pytest.mark.release]
STEP = 48  # tokens: steps begin and end inside images
TOKENS = 24
BUDGETS = (None, 33, 7)
NGRAM, MTP = "ngram", "mtp"


@dataclass(frozen=True, slots=True)
class Drafting:
    """An engine that verifies drafts, and what another one without them had answered."""

    engine: FamilyEngine
    expected: dict[int | None, list[Any]]


def asks(engine: FamilyEngine, budget: int | None) -> list[dict[str, Any]]:
    found = [
        engine.ask("landscape", "portrait", budget=budget),
        engine.ask("square", budget=budget, text="Why is it so?"),
    ]
    if budget is not None and "video" in engine.modalities:  # text between frames is among their rows
        clip, _, method = SPLITS[METHODS[-1]]
        found.append(engine.ask(clip, budget=budget, method=method, text="And then?"))
    return found


def answers(engine: FamilyEngine, budget: int | None) -> list[Any]:
    """The answers, with the logprobs of three tokens at each step."""
    return [output.outputs[0] for output in engine.generate(asks(engine, budget), tokens=TOKENS)]


def are_the_same(one: Any, other: Any, rounding: float) -> bool:
    """Whether two answers have the same tokens, up to one that another was as likely as."""
    for token, drafted, likely in zip(one.token_ids, other.token_ids, one.logprobs, strict=True):
        if token != drafted:
            return drafted in likely and abs(likely[token].logprob - likely[drafted].logprob) < rounding
    return True


def following(expected: list[Any]) -> dict[int, int]:
    """Return what came first behind each token."""
    found: dict[int, int] = {}
    for token, after in (pair for answer in expected for pair in pairwise(answer.token_ids)):
        found.setdefault(token, after)
    return found


def speculation(
    method: str, model: Path, directory: Path, expected: list[list[int]]
) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint to serve, and how it is to draft."""
    if method == MTP:
        return build_with_mtp_head(model, directory, following(expected)), {
            "method": MTP,
            "num_speculative_tokens": 1,
        }
    if method == NGRAM:
        # vLLM schedules ahead of the n-grams that it looks up on the device, and not of the others.
        name = "ngram_gpu" if runner.schedules_ahead() else NGRAM
        return model, {"method": name, "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    head = build_draft_head(method, model, directory, following(expected))
    return model, {"method": method, "model": str(head), "num_speculative_tokens": 2}


@pytest.fixture(
    scope="module",
    params=[("llava", NGRAM), ("qwen2_5_vl", EAGLE), ("qwen3_vl", EAGLE3), ("qwen3_5", MTP)],
    ids="-".join,
)
def drafting(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Drafting]:
    family, method = request.param
    if method == MTP and not runner.is_v2():
        pytest.skip("vLLM's Model Runner V1 moves states beside drafts with a Triton kernel, which no CPU runs")
    if versions.before("0.31"):
        pytest.skip("vLLM 0.29 and 0.30 verify drafts with a Triton kernel, which no CPU runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMPRUNE_ALLOW_METHODS", ",".join(methods()))
        without = FamilyEngine(family, models[family])
        expected = {budget: answers(without, budget) for budget in BUDGETS}
        without.close()
        directory = tmp_path_factory.mktemp(family) / "head"
        model, config = speculation(method, models[family], directory, [*chain(*expected.values())])
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
    # In bfloat16, of two tokens that are as likely as each other, a verified batch may prefer the other one.
    rounding = 0.0 if serving_dtype(engine.family) == "float32" else 0.1
    for one, other in zip(drafting.expected[budget], answers(engine, budget), strict=True):
        assert are_the_same(one, other, rounding), (one.token_ids, other.token_ids)
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

"""What audits do to the shares of a target: the same in every API server, and only where they are evidence."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from promprune_vllm.config import Settings
from promprune_vllm.core.audit import Scored
from promprune_vllm.core.budget import Budget, BudgetRequest
from promprune_vllm.core.load_levels import Load
from promprune_vllm.core.target import SHARES
from promprune_vllm.engine.api_server import auditor as module
from promprune_vllm.engine.api_server import target_levels as levels_module
from promprune_vllm.engine.api_server.auditor import Answered, Auditor
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan, Summary, Targeted
from promprune_vllm.engine.api_server.pruning_request import PruningRequest
from promprune_vllm.engine.api_server.target_levels import TargetLevels, target_state
from promprune_vllm.engine.keys import SUMMARY
from promprune_vllm.errors import SettingsError

pytestmark = pytest.mark.engine
TOTAL = 576


def test_two_servers_move_together(tmp_path: Path) -> None:
    servers = [TargetLevels(tmp_path / "target", 0.8, "model") for _ in range(2)]
    for n in range(200):
        if servers[0].ladders[0].index:
            break
        servers[n % 2].try_out(Targeted(0, SHARES[1]), 1.0)
    assert 20 < n < 60, "both have counted"
    assert [server.ladders[0].share for server in servers] == [SHARES[1]] * 2
    assert [ladder.share for ladder in servers[1].ladders] == [SHARES[1], 1, 1]
    assert servers[0].ladders == servers[1].ladders
    while servers[0].ladders[0].index:
        servers[1].observe(Targeted(0, SHARES[1]), 0.0)
    assert servers[1].ladders[0].attempts[1] == 1


def test_a_share_is_tried_out_only_while_it_is_the_next(tmp_path: Path) -> None:
    levels = TargetLevels(tmp_path / "target", 0.8, "model")
    assert levels.trial(Targeted(1, Fraction(1))) == Targeted(1, SHARES[1])
    assert levels.trial(Targeted(1, SHARES[1])) is None, "of an answer that began before the last step"
    assert levels.trial(None) is None


def test_one_share_for_all_images_of_a_prompt_that_of_the_largest(tmp_path: Path) -> None:
    levels = TargetLevels(tmp_path / "target", 0.8, "model")
    while levels.ladders[1].index == 0:
        levels.try_out(Targeted(1, SHARES[1]), 1.0)
    assert levels.targeted([64, 2000], PruningRequest()) == Targeted(1, SHARES[1])
    assert levels.targeted([64], PruningRequest()) == Targeted(0, Fraction(1))
    assert levels.targeted([], PruningRequest()) == Targeted(0, Fraction(1))
    assert levels.targeted([2000], PruningRequest(share=SHARES[3])) == Targeted(1, SHARES[3])


@pytest.mark.parametrize(
    ("request_", "budget", "level", "decides"),
    [
        (PruningRequest(), BudgetRequest(), SHARES[1], True),
        (PruningRequest(sent=True), BudgetRequest(), SHARES[1], True),
        (PruningRequest(method="random"), BudgetRequest(), SHARES[1], False),
        (PruningRequest(), BudgetRequest(each=Budget(tokens=3)), SHARES[1], False),
        (PruningRequest(), BudgetRequest(total=3), SHARES[1], False),
        (PruningRequest(), BudgetRequest(), SHARES[2], False),
    ],
)
def test_nothing_else_may_have_a_say(
    request_: PruningRequest, budget: BudgetRequest, level: Fraction, decides: bool
) -> None:
    assert Targeted(0, SHARES[1]).decides(request_, budget, [level, level]) == decides


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPRUNE_TARGET", "99%")
    settings = Settings.from_environment()
    assert (settings.agreement(), settings.audited_share(), settings.prunes_by_default) == (0.99, 0.05, True)
    monkeypatch.setenv("PROMPRUNE_AUDIT", "50%")
    assert Settings.from_environment().audited_share() == 0.5
    monkeypatch.setenv("PROMPRUNE_BUDGET", "full")
    assert Settings.from_environment().agreement() == 0.99
    monkeypatch.setenv("PROMPRUNE_BUDGET", "64")
    with pytest.raises(SettingsError, match="PROMPRUNE_TARGET cannot be honored: a target finds the budget"):
        Settings.from_environment()


SAME, OTHER = Scored(-0.1, True), Scored(-3.0, False)


def found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scores: dict[Fraction | None, Scored], share: Fraction
) -> list[tuple[Fraction, float]]:
    """What an audit tells the ladder of an answer that was given with the ladder's share of the tokens."""
    monkeypatch.setenv("PROMPRUNE_TARGET", "80%")
    monkeypatch.setattr(module, "current_load", Load)
    levels = TargetLevels(tmp_path / "target", 0.8, "model")
    levels.ladders[0].index = SHARES.index(share)
    monkeypatch.setattr(module, "target_levels", lambda *_: levels)
    told: list[tuple[Fraction, float]] = []
    monkeypatch.setattr(levels, "observe", lambda targeted, agreed: told.append((targeted.share, agreed)))
    scheduler = SimpleNamespace(max_num_batched_tokens=2048, policy="fcfs")
    model = SimpleNamespace(served_model_name="model", max_model_len=4096, get_vocab_size=lambda: 384)
    config = SimpleNamespace(model_config=model, scheduler_config=scheduler, use_v2_model_runner=True)
    auditor = Auditor(config, None)

    async def process(trial: Fraction | None) -> dict[str, Any]:
        asked.append(trial)
        kept = TOTAL if trial is None else int(TOTAL * trial)
        summary = Summary((ImagePlan(TOTAL, kept),), (False,), "promprune", None)
        return {"prompt_token_ids": [0] * (kept + 24), SUMMARY: summary}

    async def last_output(prompt: dict[str, Any], lora: Any) -> Any:
        score = scores[asked[-1]]
        logprob = SimpleNamespace(logprob=score.logprob, rank=1 if score.first else 2)
        answer = SimpleNamespace(finish_reason="length")
        return SimpleNamespace(prompt_logprobs=[{7: logprob}], outputs=[answer], finished=True)

    asked: list[Fraction | None] = []
    monkeypatch.setattr(auditor, "_last_output", last_output)
    served = SimpleNamespace(tokens=[7], scores=[SAME], greedy=True, lora=None)
    kept = int(TOTAL * share)
    summary = Summary((ImagePlan(TOTAL, kept),), (False,), "promprune", None, targeted=Targeted(0, share))
    assert asyncio.run(auditor._score(Answered(process, 0, summary, TOTAL + 24, served))) == "audited"
    assert asked == [
        *([None] if share < 1 else []),
        *([SHARES[SHARES.index(share) + 1]] if share > SHARES[-1] else []),
    ]
    return told


def test_at_all_tokens_one_prefill_tells_of_the_next_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert found(monkeypatch, tmp_path, {SHARES[1]: SAME}, SHARES[0]) == [(SHARES[1], 1)]
    assert found(monkeypatch, tmp_path, {SHARES[1]: OTHER}, SHARES[0]) == [(SHARES[1], 0)]


@pytest.mark.parametrize(("full", "trial", "told"), [(SAME, SAME, 1), (SAME, OTHER, 0), (OTHER, SAME, 0)])
def test_below_them_two_prefills_tell_of_both_shares(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: Scored, trial: Scored, told: int
) -> None:
    """A share on trial agrees only if all tokens and it would both have given the answer."""
    scores = {None: full, SHARES[2]: trial}
    expected = [(SHARES[1], float(full is SAME)), (SHARES[2], told)]
    assert found(monkeypatch, tmp_path, scores, SHARES[1]) == expected


def test_at_the_smallest_share_there_is_no_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert found(monkeypatch, tmp_path, {None: SAME}, SHARES[-1]) == [(SHARES[-1], 1)]


def test_what_the_route_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert target_state(None, "model").model_dump() == {"agreement": None, "sizes": []}
    levels = TargetLevels(tmp_path / "target", 0.8, "model")
    levels.try_out(Targeted(2, SHARES[1]), 1.0)
    monkeypatch.setattr(levels_module, "target_levels", lambda *_: levels)
    told = target_state(0.8, "model")
    assert [size.up_to for size in told.sizes] == [1024, 4096, None]
    assert [(size.share, size.next_share, size.agreed) for size in told.sizes] == [
        (1, 0.75, 0),
        (1, 0.75, 0),
        (1, 0.75, 1),
    ]
    assert told.sizes[0].proof == 0 < told.sizes[2].proof < 1

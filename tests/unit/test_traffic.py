"""What the demo's traffic consists of, and its sums; nothing is sent here."""

from __future__ import annotations

from itertools import islice

import pytest
from typer.testing import CliRunner

from promprune_vllm import cli, client
from promprune_vllm.core.budget import BudgetRequest as Budgets
from promprune_vllm.core.escalation import EscalationRequest as Again
from promprune_vllm.demo import sender
from promprune_vllm.demo.traffic import PLAIN, POOL, REFUSED, TEXT, UNSURE, Picture, Result, lines, plan, total
from promprune_vllm.errors import BudgetError
from promprune_vllm.metrics.metric import FORMS

METHODS = ("divprune", "random")
SENT = {*FORMS} - {"per_frame"}
"""The demo's model takes no videos."""


@pytest.mark.parametrize("seed", range(5))
def test_the_first_requests_are_one_of_everything(seed: int) -> None:
    first = list(islice(plan(seed, METHODS), len(SENT) + 4 + 4 + 3 + len(METHODS) + 1))
    assert {ask.kind for ask in first} == {*SENT, PLAIN, UNSURE, TEXT, REFUSED}
    assert {ask.method for ask in first} >= {*METHODS, None}
    assert any(ask.abort for ask in first)
    refused = [ask for ask in first if ask.kind == REFUSED]
    assert {str(ask.budget) for ask in refused} >= {"0", "plenty", "64"}
    assert any(ask.method == "no-such-method" for ask in refused)
    assert any(isinstance(ask.budget, list) for ask in refused)
    thresholds = {Again.parse(ask.escalate).below for ask in first if ask.kind == UNSURE}
    assert {None, 0.9} < thresholds, "no answer can be sure enough"


def test_a_seed_decides_everything() -> None:
    assert list(islice(plan(3, METHODS), 200)) == list(islice(plan(3, METHODS), 200))
    assert list(islice(plan(3), 200)) != list(islice(plan(4), 200))


def test_a_long_run_is_a_mix_with_repeats_and_new_images() -> None:
    asks = list(islice(plan(0, METHODS), 1000))
    pictures = [picture for ask in asks for picture in ask.pictures]
    known, new = ([p for p in pictures if (p.box is None) == whole] for whole in (True, False))
    assert 0.5 < len(known) / len(pictures) < 0.8
    assert len(set(new)) == len(new)
    assert len(set(known)) <= POOL
    assert 0.3 < sum(ask.stream for ask in asks) / len(asks) < 0.7
    assert 0 < sum(ask.abort for ask in asks) < 150
    assert all(ask.stream for ask in asks if ask.abort)
    assert {ask.kind for ask in asks if ask.escalate is not None} == {UNSURE}
    assert not any(ask.stream for ask in asks if ask.kind == UNSURE), "its headers would tell the first try"
    assert any(len(ask.pictures) == 2 for ask in asks if ask.kind == "tokens")
    assert all(not ask.pictures for ask in asks if ask.kind == TEXT)


def test_budgets_are_budgets_and_those_refused_on_purpose_cannot_be_honoured() -> None:
    for ask in islice(plan(1, METHODS), 500):
        if ask.kind != REFUSED and ask.budget is not None:
            Budgets.parse(ask.budget)
        elif ask.kind == REFUSED and ask.method is None and not isinstance(ask.budget, list):
            with pytest.raises(BudgetError):
                Budgets.parse(ask.budget)


def test_sums() -> None:
    sent = [
        Result("share", "answered", 576, 144),
        Result("tokens", "answered", 1152, 128),
        Result("tokens", "aborted", 576, 64),
        Result(UNSURE, "answered", 576, 576, asked_again=True),
        Result(REFUSED, "refused"),
    ]
    assert [line.kind for line in lines(sent)] == ["tokens", "share", UNSURE, REFUSED]
    tokens = lines(sent)[0]
    assert (tokens.requests, tokens.seen, tokens.kept, tokens.saved, tokens.aborted) == (2, 1728, 192, 1536, 1)
    every = total(sent)
    assert (every.requests, every.seen, every.kept, every.refused, every.failed) == (5, 2880, 912, 1, 0)
    assert (tokens.asked_again, every.asked_again) == (0, 1)


def test_every_picture_of_the_pool_is_a_small_jpeg() -> None:
    assert len(sender._pool()) == POOL
    whole, cut = (sender._data_url(Picture(0, box)) for box in (None, (0.1, 0.2, 0.5)))
    assert whole.startswith("data:image/jpeg;base64,")
    assert len(cut) < len(whole) < 100_000


def test_a_reply_tells_whether_it_was_asked_again() -> None:
    sure, again = ({"confidence": 0.5, "asked_again": asked} for asked in (False, True))
    tried = {"visual_tokens": {"seen": 4, "first_tries": [sure, again]}}
    assert client.was_asked_again(tried)
    assert not client.was_asked_again({"visual_tokens": {"seen": 4, "first_tries": [sure]}})
    assert not client.was_asked_again({"visual_tokens": {"seen": 4}})
    assert not client.was_asked_again({"prompt_tokens": 3})


@pytest.mark.parametrize("given", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/"])
def test_a_url_may_be_the_one_of_openais_clients(given: str) -> None:
    assert client.base_url(given) == "http://h:8000"


def test_mistakes_on_the_command_line_are_one_clear_line() -> None:
    alone = CliRunner().invoke(cli.app, ["demo", "--url", "http://127.0.0.1:9"])
    assert (alone.exit_code, "--traffic SECONDS" in alone.output) == (2, True)
    nobody = CliRunner().invoke(cli.app, ["demo", "--traffic", "1", "--url", "http://127.0.0.1:9"])
    assert (nobody.exit_code, "No server answers at http://127.0.0.1:9" in nobody.output) == (2, True)

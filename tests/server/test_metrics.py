"""Our series on the server's own ``/metrics``; vLLM's are the same with and without us."""

from __future__ import annotations

import pytest

from promprune_vllm.demo.server import Server
from promprune_vllm.metrics.catalog import CATALOG, OUTCOMES
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import ask, body, post

pytestmark = pytest.mark.server


def _outcomes(server: Server) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in server.families()
        for sample in family.samples
        if sample.name == "promprune_requests_total"
    }


def test_every_series_of_the_catalogue_is_shown_with_its_help(server: Server) -> None:
    families = {family.name: family for family in server.families()}
    for metric in CATALOG:
        family = families[metric.name.removesuffix("_total")]
        assert family.type == metric.kind
        assert family.documentation == metric.help
    assert set(_outcomes(server)) == set(OUTCOMES)
    ours = {name for name in families if name.startswith("promprune")}
    assert ours == {metric.name.removesuffix("_total") for metric in CATALOG}


def test_counts_follow_the_requests(server: Server) -> None:
    before, outcomes_before = server.metrics(), _outcomes(server)
    ask(server, "chelsea", visual_token_budget=77)  # selected here
    ask(server, "chelsea", visual_token_budget=77)  # comes from the encoder cache
    ask(server, "chelsea", "rocket", visual_token_budget=10)
    ask(server, "chelsea")
    ask(server, visual_token_budget=64)
    post(server, "/v1/chat/completions", body("chelsea", visual_token_budget=0))
    post(
        server,
        "/tokenize",
        {k: v for k, v in body("chelsea", visual_token_budget=5).items() if k in ("model", "messages")},
    )
    after, outcomes_after = server.metrics(), _outcomes(server)

    def grown(name: str) -> float:
        return after[name] - before[name]

    assert grown("promprune_visual_tokens_seen_total") == 5 * VISUAL_TOKENS
    assert grown("promprune_visual_tokens_kept_total") == 77 + 77 + 2 * 10 + VISUAL_TOKENS
    assert grown("promprune_selection_seconds_count") == 3
    assert 0 < grown("promprune_selection_seconds_sum") < 60
    assert {name: outcomes_after[name] - outcomes_before[name] for name in OUTCOMES} == {
        "pruned": 3,
        "full": 1,
        "text": 1,
        "refused": 1,
        "failed": 0,
    }


def test_vllms_own_series_are_unchanged(server: Server, stock: Server) -> None:
    for each in (server, stock):
        ask(each, "coffee")

    def series(of: Server) -> set[tuple[str, tuple[str, ...]]]:
        return {
            (sample.name, tuple(sorted(sample.labels)))
            for family in of.families()
            for sample in family.samples
            if not sample.name.startswith("promprune")
        }

    assert series(server) == series(stock)

"""The overview's first row, which one looks at first: is anything wrong, what do users get, what is it worth."""

from __future__ import annotations

from typing import Any

import audits
import escalation
from panels import BLUE, GRAY, GREEN, ORANGE, RED, YELLOW, number
from promql import KEPT, OF_MODEL, SAVED, SEEN, WAIT, in_range, quantile


def panels() -> list[Any]:
    """Return the figures: two rows of six."""
    return [*_health(), *_worth()]


def _health() -> list[Any]:
    # A failed request is also counted under its other outcome.
    total = in_range("promprune_requests_total", outcome="pruned|full|text|refused")
    unsuccessful = in_range("promprune_requests_total", outcome="refused|failed")
    return [
        number(
            "Alerts",
            "Firing alerts of this project. Prometheus lists them under /alerts, with what to do.",
            'count(ALERTS{alertname=~"PromPrune.+", alertstate="firing"}) or vector(0)',
            "none",
            base=GREEN,
            steps=((1, RED),),
        ),
        number(
            "Requests",
            "Prompts of every outcome, including those without images and videos.",
            f"round({total})",
            "short",
        ),
        number(
            "Refused or failed",
            "Share of requests whose budget was refused (HTTP 400), or whose token selection failed (HTTP 500).",
            f"{unsuccessful} / ({total} > 0)",
            "percentunit",
            base=GREEN,
            steps=((0.05, YELLOW), (0.2, RED)),
            decimals=1,
        ),
        _first_token("First token, pruned", "true"),
        _first_token("First token, all tokens", "false"),
        number(
            "Policy level",
            "Share of the server's default budget that is currently kept for requests without a budget. Below "
            "100%, the server is adapting to load; without --visual-token-adapt-to-load it stays at 100%.",
            f"min(promprune_policy_level{{{OF_MODEL}}})",
            "percentunit",
            base=RED,
            steps=((0.2, ORANGE), (0.4, YELLOW), (1, GREEN)),
        ),
    ]


def _first_token(title: str, pruned: str) -> Any:
    return number(
        title,
        "95 of 100 requests with images or videos had their first token after this time. Compare the two only if "
        "pruned and unpruned requests are alike.",
        f"{quantile(0.95, WAIT, pruned=pruned).replace('$interval', '$__range')} >= 0",
        "s",
        decimals=2,
        empty="none yet",
    )


def _worth() -> list[Any]:
    return [
        number(
            "Visual tokens saved",
            "Visual tokens that never entered the language model. Each prompt counts, even if what it shows was "
            "already cached. First answers that were thrown away are not subtracted here, but further below.",
            f"round({in_range(SAVED)})",
            "short",
            base=GREEN,
        ),
        number(
            "Share kept",
            "Visual tokens that entered the language model, as a share of all visual tokens. 100% means that "
            "nothing was pruned.",
            f"{in_range(KEPT)} / ({in_range(SEEN)} > 0)",
            "percentunit",
            base=GREEN,
            steps=((0.5, BLUE), (0.999, GRAY)),
            decimals=1,
            empty="none yet",
        ),
        number(
            "KV cache saved",
            "Bytes of KV cache that prompts did not need because of pruning, over all layers and ranks, "
            "summed over prompts (not all of them were in the cache at the same time).",
            in_range("promprune_kv_cache_saved_bytes_total"),
            "bytes",
            base=GREEN,
            empty="unknown",
        ),
        number(
            "Prefill avoided",
            "Floating-point operations of the language model's prefill that pruning avoided, by the formula in "
            "the metric's help text.",
            in_range("promprune_prefill_flops_avoided_total"),
            "si:FLOP",
            base=GREEN,
            empty="unknown",
        ),
        audits.agreeing_answers("Agreement under audit", width=4),
        escalation.asked_again("Answers asked again", width=4),
    ]

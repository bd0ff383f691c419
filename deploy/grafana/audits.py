"""The overview's row about what pruning costs: how often all visual tokens would have given the same answer."""

from __future__ import annotations

from typing import Any

from panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, YELLOW, cells, lines, number
from promql import OF_MODEL, buckets, in_range, mean, per_second

from promprune_vllm.metrics.metric import AUDITS

_ANSWERS, _TOKENS = "promprune_audited_answers_total", "promprune_audited_tokens_total"
_AUDITS, _NATS = "promprune_audits_total", "promprune_audit_nats"
_COLORS = (GREEN, YELLOW, ORANGE, BLUE, PURPLE, GRAY, "light-blue", RED)
_RESULTS = dict(zip(AUDITS, _COLORS, strict=True))
_TRIALS = "promprune_target_trials_total"
_OFF = "no audits"


def panels() -> list[Any]:
    """Return the row's panels: key figures, then the same over time."""
    return [*_figures(), *_over_time()]


def _figures() -> list[Any]:
    return [
        agreeing_answers("Answers that agree", width=5),
        _share(
            "Tokens that agree",
            "Tokens of audited answers that all visual tokens would have said too. There is an alert below 90%.",
            _TOKENS,
            ((0.9, YELLOW), (0.98, GREEN)),
        ),
        number(
            "Nats per token",
            "By how much all visual tokens make the answers less probable, on average over audited answers. 0.1 "
            "means that a token is 10% less probable.",
            mean(_NATS),
            "none",
            base=GREEN,
            steps=((0.1, YELLOW), (0.5, RED)),
            width=5,
            decimals=3,
            empty=_OFF,
        ),
        number(
            "Answers audited",
            "Answers that the figures beside are from. Below a hundred, they are rough.",
            f"round({in_range(_AUDITS, audit='audited')})",
            "short",
            base=GRAY,
            steps=((100, BLUE),),
            width=5,
        ),
        number(
            "Tokens of audits",
            "Tokens of prompts and answers that audits processed while no request waited: the price of the "
            "figures beside.",
            f"round({in_range('promprune_audit_tokens_total')})",
            "short",
            base=GRAY,
            width=4,
        ),
    ]


def agreeing_answers(title: str, width: int) -> Any:
    """Return the figure that says what pruning costs; it stands at the top of the dashboard too."""
    return _share(
        title,
        "Audited answers that all visual tokens would have given too, word for word. A long answer that "
        "differs in one word does not agree.",
        _ANSWERS,
        ((0.8, YELLOW), (0.95, GREEN)),
        width,
    )


def _share(title: str, description: str, name: str, steps: tuple[tuple[float, str], ...], width: int = 5) -> Any:
    agree = f"{in_range(name, agrees='true')} / ({in_range(name)} > 0)"
    shown = {"base": RED, "steps": steps, "width": width, "decimals": 1, "empty": _OFF}
    return number(title, description, agree, "percentunit", **shown)


def _agreement(by: str) -> str:
    return f"{per_second(_TOKENS, by, agrees='true')} / ({per_second(_TOKENS, by)} > 0)"


def _over_time() -> list[Any]:
    share: dict[str, Any] = {"unit": "percentunit", "share": True, "width": 6, "empty": _OFF}
    return [
        lines(
            "Tokens that agree, by method",
            "Share of audited tokens that all visual tokens would have said too, by the method that pruned. "
            "Average over an hour or more: with an audit of 1% there are few answers in a minute.",
            (_agreement("method"), "{{method}}"),
            **share,
        ),
        lines(
            "Tokens that agree, by share kept",
            "The same by the share of its visual tokens that a prompt kept: at most that of the legend, and more "
            "than the next smaller one. A budget pays off while its line is near the top.",
            (_agreement("kept"), "at most {{kept}} kept"),
            **share,
        ),
        cells(
            "Nats per token of audited answers",
            "Each cell is a range of nats by which all visual tokens make an answer less probable; brighter means "
            "more answers. A band that moves up means that pruning costs more.",
            buckets(_NATS),
            unit="none",
            width=6,
        ),
        lines(
            "Audits by result",
            "busy: requests began to wait. no_space: too many answers waited for their audit. too_long, refused, "
            "unsupported: this prompt cannot be audited. unanswered: the client left. failed: see the log.",
            (per_second(_AUDITS, "audit"), "{{audit}}"),
            unit="reqps",
            colors=_RESULTS,
            stacked=True,
            width=6,
            empty=_OFF,
        ),
        lines(
            "Share kept by the target",
            "What images of requests without a budget keep under --visual-token-target, by the visual tokens of "
            "the largest one. It falls where audits have proven that fewer are enough, and rises at once where "
            "they are not.",
            (f"min by (size) (promprune_target_share{{{OF_MODEL}}})", "size {{size}}"),
            **{**share, "width": 8},
        ),
        lines(
            "Proof for the next smaller share",
            "At 100%, audits have proven that the next smaller share keeps the target, and it is taken. Back to "
            "0 after each step, and where an attempt failed.",
            (f"max by (size) (promprune_target_proof{{{OF_MODEL}}})", "size {{size}}"),
            **{**share, "width": 8},
        ),
        lines(
            "Trials that agree",
            "Of the audited answers that were also scored with the next smaller share: how many that share and "
            "all visual tokens would both have given. A proof needs more than the target.",
            (
                f"{per_second(_TRIALS, 'size', agrees='true')} / ({per_second(_TRIALS, 'size')} > 0)",
                "size {{size}}",
            ),
            **{**share, "width": 8},
        ),
    ]

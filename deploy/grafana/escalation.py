"""The overview's row about answers that are asked for again: how often, at what price, and how sure models are."""

from __future__ import annotations

from typing import Any

from panels import BLUE, GREEN, ORANGE, PURPLE, RED, YELLOW, cells, lines, number
from promql import SAVED, buckets, in_range, per_second, quantile

_PROMPTS, _DISCARDED = "promprune_escalations_total", "promprune_escalation_discarded_tokens_total"
_CONFIDENCE = "promprune_answer_confidence"
_DECISIONS = {"sure": GREEN, "asked_again": ORANGE, "no_room": YELLOW, "failed": RED}
_NEVER = "no request allows it"


def panels() -> list[Any]:
    """Return the row's panels: key figures, then the same over time."""
    return [*_figures(), *_over_time()]


def _figures() -> list[Any]:
    median = quantile(0.5, _CONFIDENCE).replace("$interval", "$__range")
    return [
        asked_again("Asked again", width=6),
        number(
            "Net visual tokens saved",
            "Visual tokens saved, minus those of first tries that were thrown away. Below zero, pruning costs "
            "more visual tokens than it saves.",
            f"round({in_range(SAVED)} - {in_range(_DISCARDED, tokens='visual')})",
            "short",
            base=RED,
            steps=((0, GREEN),),
            width=6,
        ),
        number(
            "Tokens thrown away",
            "Tokens of prompts (text and images) and of answers that were processed in first tries, and then "
            "thrown away.",
            f"round({in_range(_DISCARDED, tokens='prompt|answer')})",
            "short",
            width=6,
        ),
        number(
            "Confidence, median",
            "Half of the first answers have a higher confidence: the lowest probability of the likeliest token "
            "among the first tokens.",
            f"{median} >= 0",
            "percentunit",
            width=6,
            decimals=0,
            empty=_NEVER,
        ),
    ]


def asked_again(title: str, width: int) -> Any:
    """Return the figure of second answers; it stands at the top of the dashboard too."""
    return number(
        title,
        "Answers that were thrown away for a second one with more visual tokens, as a share of the answers "
        "that could be. There is an alert above one half.",
        f"{in_range(_PROMPTS, decision='asked_again')} / ({in_range(_PROMPTS)} > 0)",
        "percentunit",
        base=GREEN,
        steps=((0.25, YELLOW), (0.5, RED)),
        width=width,
        decimals=1,
        empty=_NEVER,
    )


def _over_time() -> list[Any]:
    decisions = f"{per_second(_PROMPTS, 'decision')} / on () group_left () ({per_second(_PROMPTS)} > 0)"
    return [
        lines(
            "Answers by decision",
            "sure: the first answer left. asked_again: a second answer left. no_room: the longer prompt would not "
            "fit, so the first answer left. failed: the prompt could not be processed again.",
            (decisions, "{{decision}}"),
            unit="percentunit",
            colors=_DECISIONS,
            stacked=True,
            share=True,
            empty=_NEVER,
        ),
        lines(
            "Tokens saved, and thrown away",
            "Visual tokens that pruning saved, and what first tries cost: tokens of their prompts (the visual "
            "ones are among them) and of their answers. It pays off while the green line is far above the others.",
            (per_second(SAVED), "visual, saved"),
            (per_second(_DISCARDED, tokens="visual"), "visual, thrown away"),
            (per_second(_DISCARDED, tokens="prompt"), "prompt, thrown away"),
            (per_second(_DISCARDED, tokens="answer"), "answer, thrown away"),
            unit="tokens/s",
            colors={
                "visual, saved": GREEN,
                "visual, thrown away": ORANGE,
                "prompt, thrown away": BLUE,
                "answer, thrown away": PURPLE,
            },
        ),
        cells(
            "Confidence of first answers",
            "Each cell is a range of confidence; brighter means more answers. Those below your threshold are "
            "asked again. If there is a band just below it, a lower threshold saves many second tries.",
            buckets(_CONFIDENCE),
            unit="percentunit",
            width=8,
        ),
    ]

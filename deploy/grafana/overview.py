"""The dashboard *Overview*: what pruning saves, what is asked for, and how the server does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, YELLOW, facts, lines, number

UID = "promprune-overview"
TITLE = "PromPrune: overview"
DESCRIPTION = "What keeping fewer visual tokens saves, what clients ask for, and what the server does meanwhile."
_OF_MODEL = 'model_name=~"$model"'
_KEPT, _SEEN, _SAVED = (f"promprune_visual_tokens_{what}_total" for what in ("kept", "seen", "saved"))
_OUTCOMES = {"pruned": GREEN, "full": BLUE, "text": GRAY, "refused": ORANGE, "failed": RED}


def in_range(name: str, **labels: str) -> str:
    """Return how much a counter grew in the time range on screen."""
    return f"sum(increase({name}{{{_matchers(labels)}}}[$__range]))"


def per_second(name: str, by: str = "", **labels: str) -> str:
    """Return how fast a counter grows."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{{{_matchers(labels)}}}[$interval]))"


def quantile(q: float, name: str, by: str = "", **labels: str) -> str:
    """Return a quantile of a histogram."""
    le = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({le}) (rate({name}_bucket{{{_matchers(labels)}}}[$interval])))"


def _matchers(labels: dict[str, str]) -> str:
    return ", ".join([_OF_MODEL, *(f'{name}=~"{values}"' for name, values in labels.items())])


def rows() -> Iterator[tuple[str, list[Any]]]:
    """Yield the rows, from the figures at the top to what runs."""
    yield "In the time range on screen", _figures()
    yield "What pruning saves", _savings()
    yield "What clients ask for", _requests()
    yield "The server meanwhile (vLLM's own series)", _server()
    yield "Load and what runs", _load()


def _figures() -> list[Any]:
    return [
        number(
            "Visual tokens saved",
            "Visual tokens of images that never entered the language model. A prompt counts once, also where "
            "a cache already had its image.",
            f"round({in_range(_SAVED)})",
            "short",
            base=GREEN,
        ),
        number(
            "Share kept",
            "Visual tokens that entered the language model, of all that the images had. 100 % means that "
            "nothing was pruned.",
            f"{in_range(_KEPT)} / ({in_range(_SEEN)} > 0)",
            "percentunit",
            base=GREEN,
            steps=((0.5, BLUE), (0.999, GRAY)),
            decimals=1,
            empty="no image yet",
        ),
        number(
            "KV cache saved",
            "Bytes of KV cache that prompts did not fill because of pruning, over all layers and ranks, "
            "added up over prompts (they did not all hold them at the same time).",
            in_range("promprune_kv_cache_saved_bytes_total"),
            "bytes",
            base=GREEN,
            empty="unknown for this model",
        ),
        number(
            "Prefill avoided",
            "Floating-point operations of the language model's prefill that pruning made unnecessary, by the "
            "formula in the metric's help text.",
            in_range("promprune_prefill_flops_avoided_total"),
            "si:FLOP",
            base=GREEN,
            empty="unknown for this model",
        ),
        *_health(),
    ]


def _health() -> list[Any]:
    # A failed request was counted before, by what it asked for.
    asked = in_range("promprune_requests_total", outcome="pruned|full|text|refused")
    unhappy = in_range("promprune_requests_total", outcome="refused|failed")
    return [
        number("Requests", "Prompts of every outcome, those without images too.", f"round({asked})", "short"),
        number(
            "Refused or failed",
            "Requests whose budget could not be honoured (HTTP 400), and requests whose selection went wrong "
            "(HTTP 500), of all requests.",
            f"{unhappy} / ({asked} > 0)",
            "percentunit",
            base=GREEN,
            steps=((0.05, YELLOW), (0.2, RED)),
            decimals=1,
        ),
        number(
            "Policy level",
            "Share of the server's default that images keep now where nothing else is asked. Below 100 % the "
            "server is under load and adapts; without --visual-token-adapt-to-load it stays at 100 %.",
            f"min(promprune_policy_level{{{_OF_MODEL}}})",
            "percentunit",
            base=RED,
            steps=((0.2, ORANGE), (0.4, YELLOW), (1, GREEN)),
        ),
        number(
            "Alerts",
            "Alerts of this project that are firing; Prometheus shows under /alerts which, and what to do.",
            'count(ALERTS{alertname=~"PromPrune.+", alertstate="firing"}) or vector(0)',
            "none",
            base=GREEN,
            steps=((1, RED),),
        ),
    ]


def _savings() -> list[Any]:
    return [
        lines(
            "Visual tokens",
            "The height of both areas together is what the images had; the green part never entered the "
            "language model. More green is more saved.",
            (per_second(_KEPT), "kept"),
            (per_second(_SAVED), "saved"),
            unit="tokens/s",
            colors={"kept": BLUE, "saved": GREEN},
            stacked=True,
        ),
        lines(
            "Share kept, by method",
            "Kept of seen, for each method that selects; `none` are images that keep everything. A gap: no "
            "image of that method came.",
            (f"{per_second(_KEPT, 'method')} / ({per_second(_SEEN, 'method')} > 0)", "{{method}}"),
            unit="percentunit",
            share=True,
            empty="no image yet",
        ),
        lines(
            "KV cache and prefill saved",
            "Left axis: bytes of KV cache each second of traffic did not fill. Right axis: floating-point "
            "operations each second of traffic did not need.",
            (per_second("promprune_kv_cache_saved_bytes_total"), "KV cache"),
            (per_second("promprune_prefill_flops_avoided_total"), "prefill"),
            unit="binBps",
            colors={"KV cache": GREEN, "prefill": PURPLE},
            right={"prefill": "flops"},
            empty="unknown for this model",
        ),
    ]


def _requests() -> list[Any]:
    hits = per_second("promprune_images_total", cached="true")
    return [
        lines(
            "Requests by outcome",
            "pruned: at least one image lost tokens. full: images kept every token. text: no image. refused: "
            "HTTP 400 for the budget. failed: selecting went wrong; such a request is counted again, as failed.",
            (per_second("promprune_requests_total", "outcome"), "{{outcome}}"),
            unit="reqps",
            colors=_OUTCOMES,
            stacked=True,
            width=6,
        ),
        lines(
            "Budgets by form",
            "How the budgets of requests with images were written: a number of tokens, a share, full, auto, "
            "a list with one entry for each image, or a total they share. Requests without one do not count.",
            (per_second("promprune_budgets_total", "form"), "{{form}}"),
            unit="reqps",
            stacked=True,
            width=6,
        ),
        lines(
            "Refused, by reason",
            "invalid: not a budget. limits: outside the server's. images: does not fit the number of images. "
            "method: not allowed here. unsupported: this model or image cannot be pruned. All at zero is good.",
            (per_second("promprune_refused_requests_total", "reason"), "{{reason}}"),
            unit="reqps",
            width=6,
        ),
        lines(
            "Images, and how many were known",
            "Left axis: images each second, by whether vLLM's processor cache already had the image under "
            "the same setting. Right axis: the share it had.",
            (per_second("promprune_images_total", cached="false"), "new"),
            (hits, "known"),
            (f"{hits} / ({per_second('promprune_images_total')} > 0)", "share known"),
            unit="images/s",
            colors={"new": BLUE, "known": GREEN, "share known": GRAY},
            right={"share known": "percentunit"},
            width=6,
        ),
    ]


def _server() -> list[Any]:
    first, whole = "vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds"
    chosen = "promprune_selection_seconds"
    return [
        lines(
            "Time to first token, and selecting in it",
            "How long users wait for the first token (vLLM), with the time to choose one image's tokens "
            "(ours) below it: selecting is worth it while its line stays far beneath.",
            (quantile(0.5, first), "first token, half within"),
            (quantile(0.95, first), "first token, 95 % within"),
            (quantile(0.99, first), "first token, 99 % within"),
            (quantile(0.95, chosen, stage="choose"), "selecting (ours), 95 % within"),
            unit="s",
            colors={"selecting (ours), 95 % within": GREEN},
        ),
        lines(
            "End-to-end latency",
            "From a request's arrival to its last token (vLLM).",
            (quantile(0.5, whole), "half within"),
            (quantile(0.95, whole), "95 % within"),
            (quantile(0.99, whole), "99 % within"),
            unit="s",
        ),
        lines(
            "Throughput",
            "Tokens the language model works on: of prompts (pruning makes these fewer) and of answers.",
            (per_second("vllm:prompt_tokens_total"), "prompts"),
            (per_second("vllm:generation_tokens_total"), "answers"),
            unit="tokens/s",
            colors={"prompts": BLUE, "answers": PURPLE},
        ),
    ]


def _load() -> list[Any]:
    build = f"promprune_build_info{{{_OF_MODEL}}}"
    what = {"model_name": "model", "method": "method", "version": "promprune-vllm", "vllm_version": "vLLM"}
    return [
        lines(
            "KV cache used, and policy level",
            "The fullest engine's KV cache (vLLM), and the share of the default that images keep (ours). The "
            "policy goes down when the cache is nearly full or requests wait.",
            (f"max(vllm:kv_cache_usage_perc{{{_OF_MODEL}}})", "KV cache used"),
            (f"min(promprune_policy_level{{{_OF_MODEL}}})", "policy level"),
            unit="percentunit",
            colors={"KV cache used": ORANGE, "policy level": GREEN},
            share=True,
        ),
        lines(
            "Requests in the server",
            "Requests being worked on, and waiting for room (vLLM).",
            (f"sum(vllm:num_requests_running{{{_OF_MODEL}}})", "running"),
            (f"sum(vllm:num_requests_waiting{{{_OF_MODEL}}})", "waiting"),
            unit="short",
            colors={"running": BLUE, "waiting": ORANGE},
        ),
        facts(
            "What runs",
            "The models being served, the method that selects where a request names none, and the versions.",
            f"group by ({', '.join(what)}) ({build})",
            what,
            width=8,
        ),
    ]

"""The *Overview* dashboard: what pruning saves, what clients request, and how the server is doing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import audits
import escalation
import figures
from panels import BLUE, GRAY, GREEN, ORANGE, PURPLE, RED, YELLOW, facts, lines
from promql import KEPT, OF_MODEL, SAVED, SEEN, WAIT, per_second, quantile

UID = "promprune-overview"
TITLE = "PromPrune: overview"
DESCRIPTION = "What keeping fewer visual tokens saves, what clients request, and how the server is doing."
_OUTCOMES = {"pruned": GREEN, "full": BLUE, "text": GRAY, "refused": ORANGE, "failed": RED}


def rows() -> Iterator[tuple[str, list[Any]]]:
    """Yield the rows, from the key figures at the top to the load."""
    yield "Over the selected time range", figures.panels()
    yield "What pruning saves", _savings()
    yield "What pruning costs", audits.panels()
    yield "Videos", _videos()
    yield "What clients request", _requests()
    yield "Answers asked for again when the model is unsure", escalation.panels()
    yield "Server performance (mostly vLLM's own metrics)", _server()
    yield "Load and versions", _load()


def _savings() -> list[Any]:
    return [
        lines(
            "Visual tokens",
            "Both areas together are the visual tokens of images and videos before pruning. The green part never "
            "entered the language model: more green is more saved.",
            (per_second(KEPT), "kept"),
            (per_second(SAVED), "saved"),
            unit="tokens/s",
            colors={"kept": BLUE, "saved": GREEN},
            stacked=True,
        ),
        lines(
            "Share kept, by method",
            "Kept tokens as a share of all visual tokens, by method; `none` means images and videos that "
            "keep every token. A gap means that the method got neither.",
            (f"{per_second(KEPT, 'method')} / ({per_second(SEEN, 'method')} > 0)", "{{method}}"),
            unit="percentunit",
            colors={"none": GRAY},
            share=True,
            empty="no images or videos yet",
        ),
        lines(
            "KV cache and prefill saved",
            "Left axis: bytes of KV cache saved per second of traffic. Right axis: floating-point operations of "
            "prefill avoided per second of traffic.",
            (per_second("promprune_kv_cache_saved_bytes_total"), "KV cache"),
            (per_second("promprune_prefill_flops_avoided_total"), "prefill"),
            unit="binBps",
            colors={"KV cache": GREEN, "prefill": PURPLE},
            right={"prefill": "flops"},
            empty="unknown for this model",
        ),
    ]


def _videos() -> list[Any]:
    return [
        lines(
            "Visual tokens of videos",
            "Both areas together are the visual tokens of videos before pruning. The green part never entered the "
            "language model. Zero if no request has a video.",
            (per_second(KEPT, modality="video"), "kept"),
            (per_second(SAVED, modality="video"), "saved"),
            unit="tokens/s",
            colors={"kept": BLUE, "saved": GREEN},
            stacked=True,
        ),
        lines(
            "Share kept, images and videos",
            "Kept tokens as a share of all visual tokens, of images and of videos. A default for images does not "
            "prune videos: they have --visual-token-video-budget. A gap means that there were none.",
            (f"{per_second(KEPT, 'modality')} / ({per_second(SEEN, 'modality')} > 0)", "{{modality}}"),
            unit="percentunit",
            colors={"image": BLUE, "video": PURPLE},
            share=True,
            empty="no images or videos yet",
        ),
        lines(
            "Videos, by method",
            "Videos per second, by the method that prunes them; `none` means videos that keep every token.",
            (per_second("promprune_images_total", "method", modality="video"), "{{method}}"),
            unit="videos/s",
            colors={"none": GRAY},
            stacked=True,
        ),
    ]


def _requests() -> list[Any]:
    hits = per_second("promprune_images_total", cached="true")
    return [
        lines(
            "Requests by outcome",
            "pruned: at least one image or video lost tokens. full: all kept every token. text: there were none. "
            "refused: HTTP 400 for the budget. failed: selection failed; also counted under its other outcome.",
            (per_second("promprune_requests_total", "outcome"), "{{outcome}}"),
            unit="reqps",
            colors=_OUTCOMES,
            stacked=True,
            width=6,
        ),
        lines(
            "Budgets by form",
            "Form of the budgets in requests with images or videos: a number of tokens, a share, full, auto, a "
            "list with one entry for each, tokens per frame, or a total. Requests without one are not counted.",
            (per_second("promprune_budgets_total", "form"), "{{form}}"),
            unit="reqps",
            stacked=True,
            width=6,
        ),
        lines(
            "Refused, by reason",
            "invalid: not a budget. limits: outside the server's limits. images: does not match the images "
            "and videos. method: not allowed. unsupported: model or image cannot be pruned. All at zero is good.",
            (per_second("promprune_refused_requests_total", "reason"), "{{reason}}"),
            unit="reqps",
            width=6,
        ),
        lines(
            "Processor cache hits",
            "Left axis: images and videos per second, by whether vLLM's processor cache already had them with the "
            "same settings. Right axis: share of them that were cached.",
            (per_second("promprune_images_total", cached="false"), "new"),
            (hits, "cached"),
            (f"{hits} / ({per_second('promprune_images_total')} > 0)", "share cached"),
            unit="items/s",
            colors={"new": BLUE, "cached": GREEN, "share cached": GRAY},
            right={"share cached": "percentunit"},
            width=6,
        ),
    ]


def _server() -> list[Any]:
    first, whole = "vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds"
    selection = "promprune_selection_seconds"
    return [
        lines(
            "Time to first token, and selection time",
            "How long users wait for the first token (vLLM), and the time to select the tokens of one image or "
            "video (ours), which is part of it. Pruning pays off while the selection line stays far below.",
            (quantile(0.5, first), "first token, p50"),
            (quantile(0.95, first), "first token, p95"),
            (quantile(0.99, first), "first token, p99"),
            (quantile(0.95, selection, stage="choose"), "selection (ours), p95"),
            unit="s",
            colors={
                **{"first token, p50": BLUE, "first token, p95": YELLOW, "first token, p99": RED},
                "selection (ours), p95": GREEN,
            },
            width=6,
        ),
        lines(
            "Time to first token, with and without pruning",
            "Requests with images or videos, by whether they were pruned, behind vLLM's processing of the prompt "
            "(ours). They need not ask for the same: compare them only if the images are alike.",
            (quantile(0.5, WAIT, pruned="true"), "pruned, p50"),
            (quantile(0.95, WAIT, pruned="true"), "pruned, p95"),
            (quantile(0.5, WAIT, pruned="false"), "all tokens, p50"),
            (quantile(0.95, WAIT, pruned="false"), "all tokens, p95"),
            unit="s",
            colors={
                **{"pruned, p50": GREEN, "pruned, p95": YELLOW},
                **{"all tokens, p50": BLUE, "all tokens, p95": RED},
            },
            width=6,
        ),
        lines(
            "End-to-end latency",
            "Time from a request's arrival to its last token (vLLM).",
            (quantile(0.5, whole), "p50"),
            (quantile(0.95, whole), "p95"),
            (quantile(0.99, whole), "p99"),
            unit="s",
            colors={"p50": BLUE, "p95": YELLOW, "p99": RED},
            width=6,
        ),
        lines(
            "Throughput",
            "Tokens that the language model processes: of prompts (reduced by pruning) and of answers (vLLM).",
            (per_second("vllm:prompt_tokens_total"), "prompts"),
            (per_second("vllm:generation_tokens_total"), "answers"),
            unit="tokens/s",
            colors={"prompts": BLUE, "answers": PURPLE},
            width=6,
        ),
    ]


def _load() -> list[Any]:
    build = f"promprune_build_info{{{OF_MODEL}}}"
    what = {"model_name": "model", "method": "method", "version": "promprune-vllm", "vllm_version": "vLLM"}
    what["vllm_tested"] = "tested with it"
    return [
        lines(
            "KV cache used, and policy level",
            "KV cache usage of the fullest engine (vLLM), and the share of the default budget in force (ours). "
            "The policy level drops when the cache is nearly full or requests are waiting.",
            (f"max(vllm:kv_cache_usage_perc{{{OF_MODEL}}})", "KV cache used"),
            (f"min(promprune_policy_level{{{OF_MODEL}}})", "policy level"),
            unit="percentunit",
            colors={"KV cache used": ORANGE, "policy level": GREEN},
            share=True,
        ),
        lines(
            "Requests in the server",
            "Requests that are running, and requests that are waiting to be scheduled (vLLM).",
            (f"sum(vllm:num_requests_running{{{OF_MODEL}}})", "running"),
            (f"sum(vllm:num_requests_waiting{{{OF_MODEL}}})", "waiting"),
            unit="short",
            colors={"running": BLUE, "waiting": ORANGE},
        ),
        facts(
            "Models and versions",
            "Models being served, the default method of each, the versions, and whether that vLLM was tested.",
            f"group by ({', '.join(what)}) ({build})",
            what,
            width=8,
        ),
        facts(
            "Parts that are off",
            "Parts of the plugin that do not run, because this vLLM was not tested and changed what they need.",
            f"max by (model_name, part) (promprune_part_off{{{OF_MODEL}}}) > 0",
            {"model_name": "model", "part": "part"},
            width=24,
            height=4,
            nothing="all parts run",
        ),
    ]

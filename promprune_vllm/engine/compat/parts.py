"""The parts of this release that depend on vLLM's private code: what is lost if that code changes."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """How much of the plugin needs a part."""

    COMMON = "every pruned model"
    FAMILY = "some model families"
    FEATURE = "one feature"


@dataclass(frozen=True, slots=True)
class Part:
    """Something that works only while vLLM's code is as it was tested.

    Args:
        name: Short name, for messages, metrics and ``GET /v1/visual_tokens``.
        kind: What needs the part.
        architectures: Of a ``FAMILY`` part: the architectures that need it, as in ``config.json``.
        without: What is different without it; empty for a ``COMMON`` part, without which nothing is pruned.
    """

    name: str
    kind: Kind
    architectures: tuple[str, ...] = ()
    without: str = ""


def _family(name: str, *models: str) -> Part:
    """Return the part of some architectures: full names, or what comes before ``ForConditionalGeneration``."""
    architectures = tuple(
        model if model.endswith("Model") else f"{model}ForConditionalGeneration" for model in models
    )
    return Part(name, Kind.FAMILY, architectures, f"budgets for {', '.join(architectures)} get HTTP 400")


def _feature(name: str, without: str) -> Part:
    return Part(name, Kind.FEATURE, without=without)


REQUESTS = Part("requests", Kind.COMMON)
PROCESSOR = Part("processor", Kind.COMMON)
ROUTES = Part("routes", Kind.COMMON)
WORKER = Part("worker", Kind.COMMON)
# Common, because without it an image that fails would end the engine.
FAILED_IMAGES = Part("failed images", Kind.COMMON)

CLIP = _family("CLIP tower", "Llava", "LlavaNext", "LlavaNextVideo")
LLAVA = _family("LLaVA", "Llava")
LLAVA_NEXT = _family("LLaVA-NeXT", "LlavaNext")
LLAVA_ONEVISION = _family("LLaVA-OneVision", "LlavaOnevision")
LLAVA_NEXT_VIDEO = _family("LLaVA-NeXT-Video", "LlavaNextVideo")
_QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")
_GLM = ("Glm4v", "Glm4vMoe", "GlmOcr")
MROPE = _family("M-RoPE", *_QWEN, *_GLM)
QWEN2_VL = _family("Qwen2-VL", "Qwen2VL")
QWEN2_5_VL = _family("Qwen2.5-VL", "Qwen2_5_VL")
QWEN3_VL = _family("Qwen3-VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5", "Qwen3_5Moe")
QWEN3_VL_MOE = _family("Qwen3-VL-MoE", "Qwen3VLMoe")
QWEN3_5 = _family("Qwen3.5", "Qwen3_5", "Qwen3_5Moe")
INTERNVL_CHAT = _family("InternVL", "InternVLChatModel")
INTERNVL = _family("InternVL-HF", "InternVL")
GLM4V = _family("GLM-V", *_GLM)
GLM_OCR = _family("GLM-OCR", "GlmOcr")

USAGE = _feature("usage", "replies have no usage.visual_tokens; the headers remain")
BATCH = _feature("batch usage", "results of `vllm run-batch` have no usage.visual_tokens")
METRICS = _feature("metrics", "the metrics of prompts and their savings stay at zero")
SAVINGS = _feature("savings", "saved bytes and FLOPs are not computed")
RENDERED = _feature("rendered images", "images that a render server has processed get no headers and metrics")
LOAD = _feature("load", "budgets do not adapt to load")
INSPECTOR = _feature("inspector", "the inspector, GET /v1/visual_tokens/caches and counts of videos get HTTP 501")
ESCALATION = _feature("escalation", "answers are not asked for again; visual_token_escalate gets HTTP 400")
AUDIT = _feature("audit", "answers cannot be audited: --visual-token-audit is refused")
FEATURE_CACHE = _feature("feature cache", "there is no feature cache: images are encoded for each budget")
HARMONY = _feature("gpt-oss", "a budget sent to a gpt-oss model is ignored instead of refused")
CLIENT_ERRORS = _feature("image errors", "an image that vLLM refuses to load gets HTTP 500 instead of 400")
PREEMPTION = _feature("preemption", "a preempted request with a cached image ends the engine, as in vLLM alone")
RESENDING = _feature("resending", "an image whose first request was refused gets HTTP 500, as in vLLM alone")
NAMES = _feature("token names", "logprobs of a token without a name end the server, as in vLLM alone")
SEEDS = _feature("CPU seeds", "a seed with a prompt of several steps ends the engine on a CPU, as in vLLM alone")
COMMAND = _feature("command", "`promprune serve` does not start with the CPU build of vLLM")
REFUSAL = _feature("refusal", "wrong settings end every vLLM command, not only servers")

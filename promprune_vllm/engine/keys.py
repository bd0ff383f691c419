"""Every name that we put on objects of other programs: dict keys, attributes, methods.

Attributes that vLLM itself defines and we set are in ``WRITTEN_ATTRIBUTES``. Functions that we replace are in
``patches``.
"""

from __future__ import annotations

from collections.abc import Mapping

from promprune_vllm.core.budget import IMAGE

# Options of the multimodal processor, besides a request's own fields.
TEXT_OPTION = "visual_token_text"
"""The user's text, for methods that use it. Offline programs may set it."""
DETAIL_OPTION = "visual_token_detail"
"""OpenAI's ``detail`` of each image. Offline programs may set it."""
REQUEST = "_promprune_request"
"""The ``PruningRequest``, on its way from the renderer to the processor."""
PLAN = "_promprune_plan"
"""The ``Plan``; the Hugging Face processor must never see it."""
PROFILE = "_promprune_profile"
"""Set for vLLM's profiling run."""

# Fields of an image on its way to the model. Render servers send them to other servers, so the names are fixed.
# Those of a video have another name, see ``field_of``: one call of a processor may have both.
COUNTS = "visual_token_counts"
"""``(3,)`` int64: total tokens, kept tokens, and the index of the method among those allowed."""
TEXT_TOKENS = "visual_token_text"
"""``(M,)`` int64: tokens of the user's text, for methods that use it."""
IDENTITY = "visual_token_identity"
"""``(16,)`` uint8: the same for an image whatever its budget, method and text. Only with the feature cache."""
LAYOUT = "visual_token_layout"
"""``(T + S,)`` int64, of videos only: ``FRAME`` for each of T frames, and between them the S tokens of text there.

Empty unless the video is pruned by a method that decides how many tokens each frame keeps: which rows stand before
and behind the text is then known only in the worker, which returns the text's rows with those of the frames.
"""
FRAME = -1
"""What stands for a frame in ``LAYOUT``: no token."""


def field_of(kind: str, name: str) -> str:
    """Return the name of a field of ours for ``budget.IMAGE`` or ``VIDEO``."""
    return name if kind == IMAGE else f"{name}_{kind}"


# Keys of a processed prompt, a dict.
SUMMARY = "_promprune_summary"
"""Its ``Summary``."""
RECORDED = "_promprune_recorded"
"""Where its images are recorded for the reply: index of the first among those of the request."""
COUNTED = "_promprune_counted"
"""Set when the metrics have counted it: a prompt may be sent twice."""
TRIES = "_promprune_tries"
"""Its ``Tries``, if its answer may be asked for again: they count it, once it is known which try is answered."""
AUDIT = "_promprune_audit"
"""Its ``Drawn``, if its answer is to be audited."""
ASK_AGAIN = "_promprune_ask_again"
"""Function that processes the prompt for its second try."""
REPROCESS = "_promprune_reprocess"
"""Function that processes the prompt again and includes the pixels that were left out."""

# Attributes.
ENDPOINTS = "promprune_endpoints"
"""On the API server's app state: our endpoints. ``visual_tokens``, next to it, is the backend of our routes."""
SAVINGS = "_promprune_savings"
"""On vLLM's ``InputProcessor``: computes what a dropped token saves."""
AUDITOR = "_promprune_auditor"
"""On vLLM's ``AsyncLLM``: its ``Auditor``, if answers are audited."""
ABORTED_IN_FLIGHT = "_promprune_aborted_in_flight"
"""On the scheduler: images of requests that ended while a step was in flight, by step."""
FAILED_IMAGES = "promprune_failed_images"
"""On a step's result: cache identifiers of the images that failed in the step, if any."""
PENDING_FAILED_IMAGES = "_promprune_failed_images"
"""On the model runner: the same, until the step has a result."""
SAVED_GENERATORS = "_promprune_saved_generators"
"""On the model runner: index in the batch -> generator and its state before sampling."""
FILLER = "_promprune_filler"
"""On rows in the encoder cache: they are zeros in place of an image that failed."""
TRACE = "_promprune_trace"
"""On rows in the encoder cache: how they were selected."""
PATCHED_BY = "__promprune_patches__"
"""On a function that replaces one of vLLM's: its wrappers, innermost first."""

# Methods that ``patches`` adds to vLLM's workers.
TRACES_METHOD = "promprune_selection_traces"
"""Returns the selection traces of images."""
CACHE_SIZE_METHOD = "promprune_encoder_cache_size"
"""Returns how many images and rows the encoder cache holds."""

# Read, not written.
CALIBRATION = "promprune_calibration"
"""Field of config.json with a checkpoint's own calibration."""

OPTION_PREFIXES = ("visual_token", "_promprune")
"""Prefixes of all our processor options."""

WRITTEN_ATTRIBUTES: Mapping[str, str] = {
    "renderer._executor.submit": "threads that render pooling requests run in the context of their request",
    "multimodal_config.__class__": "M-RoPE: makes model runners call the model's hook for positions",
    "visual.blocks[i].do_not_compile, visual.merger.do_not_compile": (
        "Qwen and GLM: compiled modules ignore our hooks; the same for one layer of InternVL's tower"
    ),
    "MRotaryEmbedding.cos_sin_cache, MRotaryEmbedding.cos_sin_cache_bf16": (
        "M-RoPE: more rows, for the positions that pruned prompts reach"
    ),
    "VocabParallelEmbeddingWithLoRA.forward": "set only while we embed text, which takes no adapter",
    "AsyncModelRunnerOutput.get_output": "set on a single result, if an image failed in its step",
    "AnthropicUsage.model_config, RerankUsage.model_config": "allows extra fields, as vLLM's other usage types do",
    "app.openapi, app.routes[].dependant": "every route reads our fields, and /openapi.json shows them",
    "app.state.visual_tokens": "the backend of our routes",
    "dummy_inputs.get_dummy_processor_inputs, inputs.get_mm_hashes, inputs.hf_processor_mm_kwargs": (
        "gives older vLLM minors the hooks of the newest"
    ),
    "prometheus_client.values.ValueClass": "set only while one of our metrics is created",
    "sys.argv": "`promprune serve` runs vLLM's command line in its own process",
}
"""Attribute of another program's object -> why it is set."""

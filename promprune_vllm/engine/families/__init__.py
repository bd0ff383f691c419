"""Model families: which architectures can be pruned, and what stops one that cannot."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from typing import Any

FAMILIES = {
    "LlavaForConditionalGeneration": "promprune_vllm.engine.families.llava:PrunedLlava",
}
"""Architecture name in ``config.json`` -> our class, as a string: importing it would load the model's code."""


def register() -> None:
    """Put our classes in the place of vLLM's for every architecture of ``FAMILIES``."""
    from vllm import ModelRegistry

    registry_log = logging.getLogger("vllm.model_executor.models.registry")
    registry_log.addFilter(_expected_overwrite)
    try:
        for architecture, target in FAMILIES.items():
            ModelRegistry.register_model(architecture, target)
    finally:
        registry_log.removeFilter(_expected_overwrite)


def why_not(architectures: Iterable[str], hf_config: Any) -> str | None:
    """Return why a model's visual tokens cannot be pruned, or ``None`` when they can."""
    known = [name for name in architectures if name in FAMILIES]
    if not known:
        return (
            f"no model family for {', '.join(architectures) or 'this architecture'} "
            f"(supported: {', '.join(FAMILIES)})"
        )
    module = importlib.import_module(FAMILIES[known[0]].partition(":")[0])
    reason: str | None = module.why_not(hf_config)
    return reason


def _expected_overwrite(record: logging.LogRecord) -> bool:
    # vLLM warns that the architecture is already registered; replacing it is what a plugin is for.
    return "already registered" not in record.getMessage()

"""Whether the feature cache is on, which keeps encoded images in the worker, and what it needs from vLLM."""

from __future__ import annotations

from typing import Any

from promprune_vllm.config import FLAG, PREFIX, Settings
from promprune_vllm.engine.compat import parts, verdict
from promprune_vllm.errors import SettingsError

_GIB = 1 << 30


def capacity_bytes(settings: Settings) -> int:
    """Return the bytes of host memory that each worker process may use; 0 if the cache is off."""
    return 0 if verdict.current().is_off(parts.FEATURE_CACHE) else int(settings.feature_cache_gb * _GIB)


def require_hashes(config: Any, settings: Settings) -> None:
    """Raise ``SettingsError`` if vLLM gives images a new name in each request, so that none is ever found again.

    Args:
        config: vLLM's ``VllmConfig``.
        settings: The server's settings.
    """
    if capacity_bytes(settings) and not hashes_media(config):
        raise SettingsError(
            f"{FLAG}feature-cache-gb ({PREFIX}FEATURE_CACHE_GB) has no effect with both --mm-processor-cache-gb 0 "
            "and --no-enable-prefix-caching: vLLM then hashes no images. Turn one of them on, or drop the option."
        )


def hashes_media(config: Any) -> bool:
    """Return whether vLLM names images and videos by their content, and not anew in each request.

    Args:
        config: vLLM's ``VllmConfig``.
    """
    processor_cache_gb = config.model_config.multimodal_config.mm_processor_cache_gb
    return bool(config.cache_config.enable_prefix_caching or processor_cache_gb)

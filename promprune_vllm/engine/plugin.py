"""The entry point ``vllm.general_plugins``. vLLM calls it in every process it starts, possibly twice."""

from __future__ import annotations

import logging

# Below vLLM's logger, so that its format and level apply to ours.
logger = logging.getLogger("vllm.promprune")


def register() -> None:
    """Install the plugin, unless ``PROMPRUNE_ENABLED=false`` switches it off.

    Raises:
        IncompatibleVllmError: As ``install``.
        SettingsError: As ``install``, or the switch is neither true nor false.
    """
    from promprune_vllm.config import PREFIX, is_enabled

    if is_enabled():
        install()
    else:
        logger.info("PromPrune is off (%sENABLED=false): budgets in requests have no effect.", PREFIX)


def install() -> None:
    """Register the model families and patch what every process needs. Idempotent.

    Raises:
        IncompatibleVllmError: This vLLM is not one the release was written for.
        SettingsError: A ``PROMPRUNE_*`` variable cannot be honoured.
    """
    from promprune_vllm.config import Settings
    from promprune_vllm.engine import families, patches
    from promprune_vllm.engine.compat import versions
    from promprune_vllm.engine.compat.patching import Stage
    from promprune_vllm.metrics import recorder

    versions.require_supported_version()
    settings = Settings.from_environment()
    recorder.prepare_directory()
    families.register()
    versions.require_names(versions.PLUGIN_NAMES)
    patches.install(Stage.PLUGIN)
    if settings.adapt_to_load:
        versions.require_names(versions.LOAD_NAMES)
        patches.install(Stage.LOAD)

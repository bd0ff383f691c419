"""The entry point for ``vllm.general_plugins``. vLLM calls it in every process it starts, sometimes twice."""

from __future__ import annotations

import logging

# A child of vLLM's logger, so that vLLM's format and level apply.
logger = logging.getLogger("vllm.promprune")


def register() -> None:
    """Install the plugin, unless ``PROMPRUNE_ENABLED=false``.

    Raises:
        IncompatibleVllmError: See ``install``.
        SettingsError: See ``install``; also if ``PROMPRUNE_ENABLED`` is neither true nor false.
    """
    from promprune_vllm.config import PREFIX, is_enabled

    if is_enabled():
        install()
    else:
        logger.info("PromPrune is off (%sENABLED=false): budgets in requests have no effect.", PREFIX)


def install() -> None:
    """Register the model families and patch what every process needs. Idempotent.

    Raises:
        IncompatibleVllmError: This release does not support the installed vLLM.
        SettingsError: A ``PROMPRUNE_*`` variable has an invalid value.
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

"""The entry point for ``vllm.general_plugins``. vLLM calls it in every process it starts, sometimes twice."""

from __future__ import annotations

import logging

# A child of vLLM's logger, so that vLLM's format and level apply.
logger = logging.getLogger("vllm.promprune")


def register() -> None:
    """Install the plugin, unless ``PROMPRUNE_ENABLED=false``.

    Raises:
        SettingsError: ``PROMPRUNE_ENABLED`` or ``PROMPRUNE_UNTESTED_VLLM`` is neither true nor false.
    """
    from promprune_vllm.config import PREFIX, is_enabled

    if is_enabled():
        install()
    else:
        logger.info("PromPrune is off (%sENABLED=false): budgets in requests have no effect.", PREFIX)


def install() -> None:
    """Register the model families and patch what every process needs. Idempotent.

    With a vLLM that this release was not tested with, only what its code allows is installed; see ``verdict``.
    Errors in the settings are raised when an engine is configured, since vLLM calls this for every command.
    """
    from promprune_vllm.config import Settings
    from promprune_vllm.engine import families, patches
    from promprune_vllm.engine.api_server.postponed_errors import postpone
    from promprune_vllm.engine.compat import parts, seams, verdict
    from promprune_vllm.engine.compat.patching import Stage
    from promprune_vllm.errors import IncompatibleVllmError, SettingsError
    from promprune_vllm.metrics import recorder

    found = verdict.current()
    try:
        settings = Settings.from_environment()
        verdict.require_pruning(settings)
    except (SettingsError, IncompatibleVllmError) as error:
        if found.is_off(parts.REFUSAL):
            raise
        postpone(error)
        patches.install(Stage.REFUSAL)
        return
    if found.stock:
        return
    seams.require(parts.REQUESTS)
    recorder.prepare_directory()
    families.register()
    patches.install(Stage.PLUGIN)
    if settings.adapt_to_load or settings.audited_share():
        patches.install(Stage.LOAD)
    if settings.audited_share():
        patches.install(Stage.AUDIT)

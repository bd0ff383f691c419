"""The entry point ``vllm.general_plugins``. vLLM calls it in every process it starts, possibly twice."""

from __future__ import annotations


def register() -> None:
    """Register the model families and wrap what the plugin extends of vLLM.

    Raises:
        IncompatibleVllmError: This vLLM is not one the release was written for.
        SettingsError: A ``PROMPRUNE_*`` variable cannot be honoured.
    """
    from promprune_vllm.config import Settings
    from promprune_vllm.engine import (
        api_server,
        checks,
        counting,
        failed_requests,
        families,
        load,
        preemption,
        prerendered,
        reply,
        request,
        resending,
        token_names,
    )
    from promprune_vllm.metrics import recorder

    checks.require_supported_version()
    Settings.from_environment()
    recorder.prepare_directory()
    families.register()
    request.install()
    counting.install()
    failed_requests.install()
    load.install()
    preemption.install()
    resending.install()
    prerendered.install()
    reply.install()
    token_names.install()
    api_server.install()

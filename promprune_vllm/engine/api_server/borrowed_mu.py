"""Warns once, as a server starts, that nobody has measured the ``mu`` that it splits budgets with."""

from __future__ import annotations

import logging
from typing import Any

from promprune_vllm.config import FLAG, Settings
from promprune_vllm.core.registry import methods, options_of
from promprune_vllm.engine import families
from promprune_vllm.engine.api_server.admission import unsupported_reason
from promprune_vllm.engine.keys import CALIBRATION

# A child of vLLM's logger, so that vLLM's format and level apply.
logger = logging.getLogger("vllm.promprune")
_METHOD = "promprune"


def warn(renderer: Any) -> None:
    """Log one warning if a server prunes with a ``mu`` that was measured for another vision tower.

    Only HTTP servers and batch runs call this, and of several API servers the first one warns. Engines and workers
    do not, nor does ``promprune calibrate``, which is what the warning asks for.

    Args:
        renderer: vLLM's renderer of the server.
    """
    # Without this private attribute, every API server warns.
    is_first = getattr(renderer.config.parallel_config, "_api_process_rank", 0) <= 0
    if is_first and unsupported_reason(renderer) is None:
        text = describe(renderer.model_config, Settings.from_environment())
        if text is not None:
            logger.warning("%s", text)


def describe(model_config: Any, settings: Settings) -> str | None:
    """Return the warning about a model's ``mu``, or ``None`` if it was measured or set, or no request uses it.

    Args:
        model_config: vLLM's ``ModelConfig``.
        settings: The server's settings.
    """
    family = families.family_of(model_config.architectures)
    concerned = [name for name in settings.allowed if methods()[name].calibrated_as == _METHOD]
    if family is None or family.measured or not concerned:
        return None
    of_checkpoint = getattr(model_config.hf_config, CALIBRATION, {}).get(_METHOD, {})
    is_configured = settings.method in concerned
    if "mu" in of_checkpoint or (is_configured and "mu" in settings.method_options):
        return None
    options = options_of(settings.selector(families.calibration(model_config), concerned[0]))
    if options["kr_min"] == options["kr_max"]:  # the split is fixed
        return None
    # The server's options apply to the configured method only.
    use = (
        f"start the server with the {FLAG}method-options that it prints"
        if is_configured
        else f'put the mu that it prints into config.json: "{CALIBRATION}": {{"{_METHOD}": {{"mu": ...}}}}'
    )
    model = model_config.model
    return (
        f"PromPrune splits budgets for {model} at mu = {options['mu']} ({family.calibrated}), and may split them "
        f"badly. Run `promprune calibrate {model} --images DIR` on images like yours, then {use}."
    )

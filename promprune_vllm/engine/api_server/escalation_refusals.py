"""Where no answer can be asked for again: on some servers, and on routes and for requests that answer once."""

from __future__ import annotations

from typing import Any, NoReturn

from vllm import envs

from promprune_vllm.core.escalation import ESCALATE_FIELD
from promprune_vllm.engine.compat import parts, verdict
from promprune_vllm.errors import BudgetError


def refuse(why: str) -> NoReturn:
    """Raise ``BudgetError``: a request asks for a second try where there can be none."""
    raise BudgetError(
        f"{ESCALATE_FIELD} cannot be honored: {why}. Leave the field out, or send false.",
        param=ESCALATE_FIELD,
        reason="unsupported",
    )


def unsupported_reason(model_config: Any) -> str | None:
    """Return why this server can ask for no answer again, or ``None``."""
    if verdict.current().is_off(parts.ESCALATION):
        return f"vLLM {verdict.current().version} has changed code that it depends on"
    if getattr(envs, "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", False):
        return "with VLLM_DISABLE_REQUEST_ID_RANDOMIZATION, aborting the first try could abort the second"
    if model_config.max_logprobs == 0 or model_config.logprobs_mode != "raw_logprobs":
        return (
            "confidence is read from log-probabilities, and the server has --max-logprobs "
            f"{model_config.max_logprobs} and --logprobs-mode {model_config.logprobs_mode}, not raw_logprobs"
        )
    return None

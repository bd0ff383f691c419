"""Turns a budget that cannot be honored into vLLM's own HTTP 400."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from promprune_vllm.errors import BudgetError
from promprune_vllm.metrics.recorder import recorder


@contextmanager
def refusing(model_config: Any | None) -> Iterator[None]:
    """Re-raise ``BudgetError`` as vLLM's HTTP 400; count the refusal if a model is given."""
    try:
        yield
    except BudgetError as error:
        from vllm.exceptions import VLLMValidationError

        if model_config is not None:
            recorder(model_config.served_model_name).refused(error.reason)
        raise VLLMValidationError(str(error), parameter=error.param) from error

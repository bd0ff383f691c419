"""Every error this package raises on purpose.

    PromPruneError
    ├── BudgetError              a budget that cannot be honoured: HTTP 400
    ├── SettingsError            a server setting that cannot be honoured: no start
    │   └── UnknownMethodError
    ├── UnsupportedModelError    a model whose visual tokens we cannot prune
    ├── IncompatibleVllmError    a vLLM this release was not written for
    ├── CalibrationError         no images to calibrate with, or a model vLLM cannot load
    ├── BenchError               a measurement that could not be made
    ├── PlanError                a model or a GPU that no plan can be made for
    ├── EvaluationError          questions that could not be asked, or answers that do not belong together
    ├── InspectError             an image that a server cannot be asked about, or a picture that cannot be drawn
    └── DemoError                the demo's own server did not start or did not stay

A message carries the value found, the limit, and what to do next.
"""

from __future__ import annotations

from typing import Literal

BudgetReason = Literal["invalid", "limits", "images", "method", "unsupported", "field"]
"""Not a budget; outside the server's limits; no fit for the number of images; a method that is not allowed; a
model or an image that cannot be pruned; a field misspelled or in the wrong place."""


class PromPruneError(Exception):
    """Base of every error raised on purpose by promprune-vllm."""


class BudgetError(PromPruneError, ValueError):
    """A budget that cannot be honoured.

    Args:
        message: What is wrong, with the value, the limits and the next step.
        param: The request field it came from, as OpenAI's error form names it.
        reason: What it is counted as.
    """

    def __init__(
        self, message: str, *, param: str = "visual_token_budget", reason: BudgetReason = "invalid"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason


class SettingsError(PromPruneError, ValueError):
    """A setting of the server or of a method that cannot be honoured."""


class UnknownMethodError(SettingsError):
    """A method name that is not in the registry."""


class UnsupportedModelError(PromPruneError):
    """A model whose visual tokens cannot be pruned, with the reason."""


class IncompatibleVllmError(PromPruneError, RuntimeError):
    """A vLLM whose private names are not the ones this release relies on."""


class CalibrationError(PromPruneError):
    """There are no images to calibrate with, or vLLM cannot load the model."""


class InspectError(PromPruneError):
    """An image that a server cannot be asked about, or a picture that cannot be drawn."""


class DemoError(PromPruneError):
    """The server of the demo did not start, or ended."""


class BenchError(PromPruneError):
    """A measurement that could not be made."""


class PlanError(PromPruneError):
    """A model or a GPU that no plan can be made for."""


class EvaluationError(PromPruneError):
    """Questions that could not be asked, or answers that do not belong together."""

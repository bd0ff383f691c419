"""Every error this package raises on purpose.

    PromPruneError
    ├── BudgetError              a budget that cannot be honored: HTTP 400
    ├── SettingsError            a server setting that cannot be honored: the server does not start
    │   └── UnknownMethodError
    ├── UnsupportedModelError    a model whose visual tokens we cannot prune
    ├── IncompatibleVllmError    a vLLM version this release does not support
    ├── CalibrationError         no images to calibrate with, or a model vLLM cannot load
    ├── BenchError               a measurement failed
    ├── PlanError                a model or GPU that `promprune plan` cannot handle
    ├── EvaluationError          an evaluation could not send its questions, or its results cannot be combined
    ├── InspectError             an image could not be inspected on a server, or its picture could not be drawn
    └── DemoError                the demo's server did not start or stopped early

Messages give the value received, the limit, and the next step.
"""

from __future__ import annotations

from typing import Literal

BudgetReason = Literal["invalid", "limits", "images", "method", "unsupported", "field"]
"""In order: not a budget; outside the server's limits; does not match the images and videos; method not
allowed; model, image or video cannot be pruned; field misspelled or in the wrong place."""


class PromPruneError(Exception):
    """Base class of every error promprune-vllm raises on purpose."""


class BudgetError(PromPruneError, ValueError):
    """A budget that cannot be honored.

    Args:
        message: What is wrong, with the value, the limits and the next step.
        param: The request field at fault: ``param`` in OpenAI's error object.
        reason: Label of the refusal in the metrics.
    """

    def __init__(
        self, message: str, *, param: str = "visual_token_budget", reason: BudgetReason = "invalid"
    ) -> None:
        super().__init__(message)
        self.param = param
        self.reason = reason


class SettingsError(PromPruneError, ValueError):
    """A setting of the server or an option of a method that cannot be honored."""


class UnknownMethodError(SettingsError):
    """A method name that is not in the registry."""


class UnsupportedModelError(PromPruneError):
    """A model whose visual tokens cannot be pruned, with the reason."""


class IncompatibleVllmError(PromPruneError, RuntimeError):
    """A vLLM version without the private names this release relies on."""


class CalibrationError(PromPruneError):
    """There are no images to calibrate with, or vLLM cannot load the model."""


class InspectError(PromPruneError):
    """An image could not be inspected on a server, or its picture could not be drawn."""


class DemoError(PromPruneError):
    """The demo's server did not start or stopped early."""


class BenchError(PromPruneError):
    """A measurement failed."""


class PlanError(PromPruneError):
    """A model or GPU that ``promprune plan`` cannot handle."""


class EvaluationError(PromPruneError):
    """An evaluation could not send its questions, or its results cannot be combined."""

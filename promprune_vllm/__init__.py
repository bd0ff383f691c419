"""promprune-vllm: keep only the K most useful visual tokens of each image, with K set per request.

As a library: ``select(VisionFeatures(...), keep, method="promprune").indices``. The vLLM plugin registers
itself through the entry point ``vllm.general_plugins`` and is not imported from here.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_MODULE_BY_NAME = {
    "Budget": "promprune_vllm.core.budget",
    "BudgetPolicy": "promprune_vllm.core.policy",
    "Need": "promprune_vllm.core.features",
    "Selection": "promprune_vllm.core.selection",
    "VisionFeatures": "promprune_vllm.core.features",
    "get_method": "promprune_vllm.core.registry",
    "methods": "promprune_vllm.core.registry",
    "select": "promprune_vllm.core.select",
    "select_many": "promprune_vllm.core.select",
}
__all__ = [*sorted(_MODULE_BY_NAME), "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from promprune_vllm.core.budget import Budget as Budget
    from promprune_vllm.core.features import Need as Need
    from promprune_vllm.core.features import VisionFeatures as VisionFeatures
    from promprune_vllm.core.policy import BudgetPolicy as BudgetPolicy
    from promprune_vllm.core.registry import get_method as get_method
    from promprune_vllm.core.registry import methods as methods
    from promprune_vllm.core.select import select as select
    from promprune_vllm.core.select import select_many as select_many
    from promprune_vllm.core.selection import Selection as Selection


def __getattr__(name: str) -> Any:
    # Lazy imports keep `promprune --help` and vLLM's plugin discovery fast.
    if name not in _MODULE_BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULE_BY_NAME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_BY_NAME])

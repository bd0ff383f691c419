"""A worker extension, named on the command line of one test's server, whose selections can be made to fail."""

from __future__ import annotations

import json
from typing import Any

from promprune_vllm.core.features import VisionFeatures
from promprune_vllm.core.selection import Selection


class Breaking:
    """A method that cannot keep certain numbers of tokens."""

    def __init__(self, method: Any, keeps: list[int]) -> None:
        self.name, self.needs, self.method, self.keeps = method.name, method.needs, method, keeps

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        if keep in self.keeps:
            raise RuntimeError(f"cannot keep {keep}")
        selection: Selection = self.method.select(features, keep)
        return selection


class BrokenWorker:
    """For ``--worker-extension-cls``."""

    rank: int
    model_runner: Any

    def break_selection(self, keeps_by_rank: str) -> None:
        """Make the selections of these many tokens fail, by rank: ``{"0": [64]}``. ``{}`` mends it."""
        model = self.model_runner.get_model()
        method = getattr(model._methods[0], "method", model._methods[0])
        model._methods[0] = Breaking(method, json.loads(keeps_by_rank).get(str(self.rank), []))

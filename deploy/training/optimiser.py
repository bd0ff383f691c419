"""The optimizers: Muon for the matrices of the layers, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MUON_RATE = 3e-3
_ADAM_SHARE = 0.5
_CLIP = 1.0


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with "match_rms_adamw", but in float32 and for all matrices of one shape at once.

    torch's own version handles matrices one by one in bfloat16, which a CPU without bfloat16 instructions
    emulates: that took a fifth of each step.
    """

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        super().__init__(matrices, {"lr": MUON_RATE, "weight_decay": 0.01, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # nothing to call
        """Update every matrix that has a gradient."""
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, alike in by_shape.items():
            updates = []
            for matrix in alike:
                gradient, state = matrix.grad, self.state[matrix]
                assert gradient is not None
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(state["momentum_buffer"], group["momentum"]))
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            for matrix, update in zip(alike, _orthogonal(torch.stack(updates)), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def _orthogonal(updates: Tensor) -> Tensor:
    """Move all singular values of `(N, rows, columns)` matrices close to 1 by Newton-Schulz iterations."""
    tall = updates.shape[1] > updates.shape[2]
    wide = updates.mT if tall else updates
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        wide = torch.baddbmm(wide, gram, wide, beta=3.4445)
    return wide.mT if tall else wide


class Optimiser:
    """Both optimizers with a single `step`, which can leave out parts of the model."""

    def __init__(self, parts: dict[str, Iterable[tuple[str, nn.Parameter]]]) -> None:
        self.groups: dict[str, list[torch.optim.Optimizer]] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for part, named in parts.items():
            trained = [(name, p) for name, p in named if p.requires_grad]
            matrices = [p for name, p in trained if p.ndim == 2 and ".layers." in name]
            rest = [p for name, p in trained if not (p.ndim == 2 and ".layers." in name)]
            self.parameters[part] = [p for _, p in trained]
            self.groups[part] = [
                torch.optim.AdamW(rest, lr=MUON_RATE * _ADAM_SHARE, betas=(0.9, 0.98), weight_decay=0.01)
            ]
            if matrices:
                self.groups[part].append(Muon(matrices))

    def step(self, rates: dict[str, float]) -> None:
        """Update each part with its share of the full learning rate; parts without a rate are not updated."""
        for part, rate in rates.items():
            torch.nn.utils.clip_grad_norm_(self.parameters[part], _CLIP)
            for optimiser in self.groups[part]:
                share = _ADAM_SHARE if isinstance(optimiser, torch.optim.AdamW) else 1.0
                for group in optimiser.param_groups:
                    group["lr"] = MUON_RATE * share * rate
                optimiser.step()
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`."""
        return {part: [optimiser.state_dict() for optimiser in group] for part, group in self.groups.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        for part, group in self.groups.items():
            for optimiser, one in zip(group, state[part], strict=True):
                optimiser.load_state_dict(one)

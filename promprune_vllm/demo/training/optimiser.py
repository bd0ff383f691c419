"""Muon for the matrices of the layers, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

MUON_RATE = 3e-3
_ADAM_SHARE = 0.5
_CLIP = 1.0


class Optimiser:
    """Both optimisers behind one `step`; parts of the model can be left out of a step."""

    def __init__(self, parts: dict[str, Iterable[tuple[str, nn.Parameter]]]) -> None:
        self.groups: dict[str, list[torch.optim.Optimizer]] = {}
        self.parameters: dict[str, list[nn.Parameter]] = {}
        for part, named in parts.items():
            wanted = [(name, p) for name, p in named if p.requires_grad]
            matrices = [p for name, p in wanted if p.ndim == 2 and ".layers." in name]
            rest = [p for name, p in wanted if not (p.ndim == 2 and ".layers." in name)]
            self.parameters[part] = [p for _, p in wanted]
            self.groups[part] = [
                torch.optim.AdamW(rest, lr=MUON_RATE * _ADAM_SHARE, betas=(0.9, 0.98), weight_decay=0.01)
            ]
            if matrices:
                muon = torch.optim.Muon(
                    matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=5
                )
                self.groups[part].append(muon)

    def step(self, rates: dict[str, float]) -> None:
        """Move each part by its own share of the full learning rate; one that is not named stays."""
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
        """What `load_state_dict` takes."""
        return {part: [optimiser.state_dict() for optimiser in group] for part, group in self.groups.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was."""
        for part, group in self.groups.items():
            for optimiser, one in zip(group, state[part], strict=True):
                optimiser.load_state_dict(one)

"""What training makes small."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from promprune_vllm.demo.scenes.record import GRID
from promprune_vllm.demo.training.samples import EDGE, LABELS, NONE

_CLASSES = LABELS[:4]
_WEIGHTS = {
    "shape": 1.0,
    "colour": 0.7,
    "digit": 1.0,
    "rank": 0.3,
    "centre": 0.7,
    "xy": 1.0,
    "look": 0.2,
    "shown": 5.0,
}
_END_WEIGHT = 0.1  # of </s> after the answer: it is learnt at once
_NEVER = -1e9  # a logit; minus infinity has no gradient where nothing else is


def patch_loss(
    told: dict[str, Tensor], shown: Tensor, truth: tuple[Tensor, Tensor], indices: Tensor, looks: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The auxiliary loss of the tower.

    Args:
        told: ``(B, K, width)`` by name of head.
        shown: ``(B, SHOWN)`` logits of the class token.
        truth: Labels ``(B, K, 5)`` and what is shown ``(B, SHOWN)``.
        indices: ``(B, K)``, which patches these are.
        looks: ``(B, K, 5)`` of `forward.look`.

    Returns:
        The loss, and by name a share right (of classes) or a loss (of the others).
    """
    labels, present = truth
    parts: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for column, name in enumerate(_CLASSES):
        target = labels[..., column].flatten().long()
        logits = told[name].flatten(0, 1).float()
        known = target != NONE
        losses = functional.cross_entropy(logits, target, ignore_index=NONE, reduction="sum")
        parts[name] = losses / known.sum().clamp(min=1)
        seen[name] = ((logits.argmax(-1) == target) & known).sum() / known.sum().clamp(min=1)
    centre = labels[..., 4].float()
    each = functional.binary_cross_entropy_with_logits(told["centre"][..., 0].float(), centre, reduction="none")
    parts["centre"] = (each * (centre != NONE)).sum() / (centre != NONE).sum().clamp(min=1)
    places = torch.stack([indices % GRID, indices // GRID], dim=-1) * (2 / (GRID - 1)) - 1
    parts["xy"] = functional.mse_loss(told["xy"].float(), places.float())
    parts["look"] = functional.mse_loss(told["look"].float(), looks.float())
    parts["shown"] = functional.binary_cross_entropy_with_logits(shown.float(), present.float())
    seen |= {name: parts[name] for name in ("centre", "xy", "look", "shown")}
    total = torch.stack([_WEIGHTS[name] * part for name, part in parts.items()]).sum()
    return total, {name: value.detach() for name, value in seen.items()}


def gaze_loss(looks: list[Tensor], text: Tensor, owner: Tensor) -> Tensor:
    """Make words look at the patches of what they name, and at the prompt's beginning where there is none.

    In the next layer the place of the answer is made to look at these words. What stands at a thing's edge
    (`EDGE`) is neither right nor wrong to look at.

    Args:
        looks: Two of ``(B, heads, T, P + K + T)`` of `forward.read`: P tokens of the prompt, then the image, then
            the text.
        text: ``(B, 6, T)`` of `samples.pack`.
        owner: ``(B, K)``, the thing that a patch must tell of.
    """
    named, number = text[:, 5].long(), text[:, 2]
    length, things = named.shape[1], owner[:, None, :].long()
    wanted = (named[..., None].clamp(min=0) >> things.clamp(min=0) & 1).bool() & (things >= 0)
    prompt = looks[0].shape[-1] - owner.shape[-1] - length
    nothing = ~wanted.any(-1, keepdim=True).expand(-1, -1, prompt)
    edges = functional.pad(things == EDGE, (prompt, 0))[:, None]
    image = looks[0][..., :-length].float().masked_fill(edges, _NEVER)
    asked = named != NONE
    seen = _missing(image, torch.cat([nothing, wanted], dim=-1), asked)
    words = (number[:, :, None] == number[:, None, :]) & asked[:, None, :]
    words = functional.pad(words, (looks[1].shape[-1] - length, 0))
    return seen + _missing(looks[1].float(), words, (text[:, 4] != NONE) & words.any(-1))


def _missing(logits: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    """Mean surprise, in nats, at how much attention `(B, heads, T, C)` rows `(B, T)` pay to the columns wanted."""
    shares = logits.log_softmax(-1).masked_fill(~wanted[:, None], _NEVER).logsumexp((1, 3))
    shares = (shares - math.log(logits.shape[1])).masked_fill(~rows, 0.0)
    return -shares.sum() / rows.sum().clamp(min=1)


def answer_loss(logits: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the packed answers.

    Args:
        logits: ``(B, T, V)``.
        text: ``(B, 6, T)`` of `samples.pack`.

    Returns:
        The loss, and ``(B, T)`` whether the answer to come is the largest logit.
    """
    target = text[:, 3].long()
    each = functional.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=NONE, reduction="none"
    ).view_as(target)
    answers = text[:, 4] != NONE
    weights = torch.where(answers, 1.0, _END_WEIGHT) * (target != NONE)
    return (each * weights).sum() / weights.sum().clamp(min=1e-6), (logits.argmax(-1) == target).detach()

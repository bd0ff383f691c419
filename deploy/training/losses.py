"""What training makes small."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from deploy.training.forward import NEVER
from deploy.training.samples import EDGE, LABELS, NONE, TASK_IDS
from promprune_vllm.demo.scenes.record import GRID

_CLASSES = LABELS[:4]
_WEIGHTS = {
    "shape": 1.0,
    "colour": 0.7,
    "digit": 1.0,
    "rank": 0.3,
    "centre": 2.0,
    "xy": 1.0,
    "look": 0.2,
    "shown": 5.0,
}
_END_WEIGHT = 0.1  # of </s> after the answer: it is learnt at once
_COUNT_WEIGHT = 4.0  # of a number of things: learnt last, at half right when all else is above nine in ten
_NOBODY = 3.0  # spreads the shares of none to four: 0, 0.25, 0.4, 0.5, 0.57


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
    known, centre = labels[..., 4] != NONE, labels[..., 4].float() / 100
    each = functional.binary_cross_entropy_with_logits(told["centre"][..., 0].float(), centre, reduction="none")
    parts["centre"] = (each * known).sum() / known.sum().clamp(min=1)
    parts["xy"] = functional.mse_loss(told["xy"].float(), _coordinates(indices))
    parts["look"] = functional.mse_loss(told["look"].float(), looks.float())
    parts["shown"] = functional.binary_cross_entropy_with_logits(shown.float(), present.float())
    seen |= {name: parts[name] for name in ("centre", "xy", "look", "shown")}
    total = torch.stack([_WEIGHTS[name] * part for name, part in parts.items()]).sum()
    return total, {name: value.detach() for name, value in seen.items()}


def gaze_loss(looks: list[Tensor], text: Tensor, owner: Tensor, centre: Tensor) -> Tensor:
    """Make attention take the way from a question to its answer, a layer a step.

    Words that name a thing look at the word before them; then at the patches of what they name, or at the prompt's
    beginning where there is none; then the place of the answer looks at these words. Left to itself the reader did
    not find the first step in half an hour. A patch at a thing's edge (`EDGE`) is neither right nor wrong.

    Shares of attention add up to one, so looking at all there is of something tells nothing of how many there are:
    words that ask for a number look at each thing alike, by its centre, and at the prompt's beginning `_NOBODY`
    times as much.

    Args:
        looks: Three of ``(B, heads, T, P + K + T)`` of `forward.read`: prompt, image, text.
        text: ``(B, 6, T)`` of `samples.pack`.
        owner: ``(B, K)``, the thing that a patch must tell of.
        centre: ``(B, K)``, the patch's share of its thing.
    """
    named, number = text[:, 5].long(), text[:, 2]
    length = named.shape[1]
    before = looks[0].shape[-1] - length
    prompt = before - owner.shape[-1]
    asked = named != NONE
    same = _together(number)
    counted = asked & (same & (text[:, 4] == TASK_IDS["count"])[:, None, :]).any(-1)
    previous = torch.eye(length, dtype=torch.bool, device=text.device).roll(-1, 1).tril()[None]
    wanted = _patches(named, owner)
    nothing = ~wanted.any(-1, keepdim=True).expand(-1, -1, prompt)
    edges = functional.pad(owner == EDGE, (prompt, 0))[:, None, None]
    words = same & asked[:, None, :]
    return (
        _missing(looks[0], functional.pad(previous, (before, 0)), asked)
        + _missing(
            looks[1][..., :before].masked_fill(edges, NEVER),
            torch.cat([nothing, wanted], dim=-1),
            asked & ~counted,
        )
        + _miscounted(looks[1][..., :before], wanted * centre[:, None], counted)
        + _missing(looks[2], functional.pad(words, (before, 0)), (text[:, 4] != NONE) & words.any(-1))
    )


def _miscounted(logits: Tensor, shares_wanted: Tensor, rows: Tensor) -> Tensor:
    """Mean divergence, in nats, of attention `(B, heads, T, P + K)` from what tells how many are wanted."""
    prompt = logits.shape[-1] - shares_wanted.shape[-1]
    heads = logits.float().log_softmax(-1)  # each by itself
    shares, nobody = heads[..., prompt:].mean(1), heads[..., :prompt].logsumexp(-1).mean(1)
    total = shares_wanted.sum(-1) + _NOBODY  # (B, T)
    cross = -(_NOBODY * nobody + (shares * shares_wanted).sum(-1)) / total
    own = total.log() - (_NOBODY * math.log(_NOBODY) + torch.xlogy(shares_wanted, shares_wanted).sum(-1)) / total
    return ((cross - own) * rows).sum() / rows.sum().clamp(min=1)


def place_loss(told: list[Tensor], text: Tensor, owner: Tensor) -> Tensor:
    """Make words that name one thing know where it is, and the place of the answer what they know.

    Everything else that is asked was learnt without; where things are was at chance after an hour.

    Args:
        told: Two of ``(B, T, 2)``: what words tell after they looked at the image, and the place of the answer
            after it looked at the words; columns and rows, -1 to 1.
        text: ``(B, 6, T)`` of `samples.pack`.
        owner: ``(B, 576)``, the thing that a patch must tell of, of all patches.
    """
    named, number = text[:, 5].long(), text[:, 2]
    one = (named > 0) & (named & (named - 1) == 0)
    mine = _patches(named, owner)
    places = _coordinates(torch.arange(GRID * GRID, device=text.device))
    where = mine.float() @ places / mine.sum(-1, keepdim=True).clamp(min=1)  # (B, T, 2)
    same = _together(number) & one[:, None, :] & (text[:, 4] != NONE)[:, :, None]
    alone = same.sum(-1) == 1
    answered = (same.float() @ where) * alone[..., None]
    loss = torch.zeros((), device=text.device)
    for values, truth, rows in zip(told, (where, answered), (one, alone), strict=True):
        loss = loss + ((values.float() - truth).square().mean(-1) * rows).sum() / rows.sum().clamp(min=1)
    return loss


def _coordinates(indices: Tensor) -> Tensor:
    """Columns and rows of patches, -1 to 1: `(...)` to `(..., 2)`."""
    return torch.stack([indices % GRID, indices // GRID], dim=-1) * (2 / (GRID - 1)) - 1


def _together(number: Tensor) -> Tensor:
    """Which tokens `(B, T)` belong to the same question, `(B, T, T)`."""
    return number[:, :, None] == number[:, None, :]


def _patches(named: Tensor, owner: Tensor) -> Tensor:
    """Which patches `(B, K)` tell of what words `(B, T)` name, `(B, T, K)` bool."""
    things = owner[:, None, :].long()
    return (named[..., None].clamp(min=0) >> things.clamp(min=0) & 1).bool() & (things >= 0)


def _missing(logits: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    """Mean surprise, in nats, at how much attention `(B, heads, T, C)` rows `(B, T)` pay to the columns wanted."""
    shares = logits.float().log_softmax(-1).masked_fill(~wanted[:, None], NEVER).logsumexp((1, 3))
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
    weights = torch.where(text[:, 4] == TASK_IDS["count"], _COUNT_WEIGHT, weights)
    return (each * weights).sum() / weights.sum().clamp(min=1e-6), (logits.argmax(-1) == target).detach()

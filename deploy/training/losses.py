"""The training losses."""

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
_END_WEIGHT = 0.1  # weight of </s> after the answer, which is learned quickly
_COUNT_WEIGHT = 4.0  # weight of counts, learned last: half are right when all else is above nine in ten
_NOBODY = 3.0  # spreads the attention shares for counts of zero to four: 0, 0.25, 0.4, 0.5, 0.57


def patch_loss(
    predictions: dict[str, Tensor],
    shown: Tensor,
    truth: tuple[Tensor, Tensor],
    indices: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the auxiliary loss of the tower.

    Args:
        predictions: ``(B, K, width)`` logits or values by head.
        shown: ``(B, SHOWN)`` logits of the class token.
        truth: Labels ``(B, K, 5)``, and targets of the class token ``(B, SHOWN)``.
        indices: ``(B, K)`` indices of these patches.
        statistics: ``(B, K, 5)`` from `forward.patch_statistics`.

    Returns:
        The loss, and a figure by name: the share of right predictions for classes, a loss for the others.
    """
    labels, present = truth
    parts: dict[str, Tensor] = {}
    figures: dict[str, Tensor] = {}
    for column, name in enumerate(_CLASSES):
        target = labels[..., column].flatten().long()
        logits = predictions[name].flatten(0, 1).float()
        labeled = target != NONE
        losses = functional.cross_entropy(logits, target, ignore_index=NONE, reduction="sum")
        parts[name] = losses / labeled.sum().clamp(min=1)
        figures[name] = ((logits.argmax(-1) == target) & labeled).sum() / labeled.sum().clamp(min=1)
    labeled, centre = labels[..., 4] != NONE, labels[..., 4].float() / 100
    each = functional.binary_cross_entropy_with_logits(
        predictions["centre"][..., 0].float(), centre, reduction="none"
    )
    parts["centre"] = (each * labeled).sum() / labeled.sum().clamp(min=1)
    parts["xy"] = functional.mse_loss(predictions["xy"].float(), _coordinates(indices))
    parts["look"] = functional.mse_loss(predictions["look"].float(), statistics.float())
    parts["shown"] = functional.binary_cross_entropy_with_logits(shown.float(), present.float())
    figures |= {name: parts[name] for name in ("centre", "xy", "look", "shown")}
    total = torch.stack([_WEIGHTS[name] * part for name, part in parts.items()]).sum()
    return total, {name: value.detach() for name, value in figures.items()}


def gaze_loss(attention: list[Tensor], text: Tensor, owner: Tensor, centre: Tensor) -> Tensor:
    """Return a loss that guides attention from a question to its answer, one step per layer.

    Words that name a thing attend to the word before them; then to the patches of what they name, or to the start
    of the prompt if there is no such thing; then the answer position attends to these words. Without this loss,
    the reader did not find the first step in half an hour. Patches at a thing's edge (`EDGE`) count neither way.

    Attention adds up to one, so attending to all instances of something does not show how many there are. Words
    that ask for a number therefore attend equally to the center of each thing, and `_NOBODY` times as much to the
    start of the prompt.

    Args:
        attention: Three of ``(B, heads, T, P + K + T)`` from `forward.predict`: prompt, image, text.
        text: ``(B, 6, T)`` from `samples.pack`.
        owner: ``(B, K)``, the thing that each patch is labeled with.
        centre: ``(B, K)``, each patch's share of its thing.
    """
    named, number = text[:, 5].long(), text[:, 2]
    length = named.shape[1]
    before = attention[0].shape[-1] - length
    prompt = before - owner.shape[-1]
    names_things = named != NONE
    same = _together(number)
    counted = names_things & (same & (text[:, 4] == TASK_IDS["count"])[:, None, :]).any(-1)
    previous = torch.eye(length, dtype=torch.bool, device=text.device).roll(-1, 1).tril()[None]
    wanted = _patches(named, owner)
    nothing = ~wanted.any(-1, keepdim=True).expand(-1, -1, prompt)
    edges = functional.pad(owner == EDGE, (prompt, 0))[:, None, None]
    words = same & names_things[:, None, :]
    return (
        _missing(attention[0], functional.pad(previous, (before, 0)), names_things)
        + _missing(
            attention[1][..., :before].masked_fill(edges, NEVER),
            torch.cat([nothing, wanted], dim=-1),
            names_things & ~counted,
        )
        + _miscounted(attention[1][..., :before], wanted * centre[:, None], counted)
        + _missing(attention[2], functional.pad(words, (before, 0)), (text[:, 4] != NONE) & words.any(-1))
    )


def _miscounted(logits: Tensor, shares_wanted: Tensor, rows: Tensor) -> Tensor:
    """Return the mean divergence, in nats, of attention `(B, heads, T, P + K)` from shares that show a count."""
    prompt = logits.shape[-1] - shares_wanted.shape[-1]
    heads = logits.float().log_softmax(-1)  # each by itself
    shares, nobody = heads[..., prompt:].mean(1), heads[..., :prompt].logsumexp(-1).mean(1)
    total = shares_wanted.sum(-1) + _NOBODY  # (B, T)
    cross = -(_NOBODY * nobody + (shares * shares_wanted).sum(-1)) / total
    own = total.log() - (_NOBODY * math.log(_NOBODY) + torch.xlogy(shares_wanted, shares_wanted).sum(-1)) / total
    return ((cross - own) * rows).sum() / rows.sum().clamp(min=1)


def place_loss(predictions: list[Tensor], text: Tensor, owner: Tensor) -> Tensor:
    """Return a loss on the predicted position of things: at words that name one thing, and at the answer position.

    All other tasks were learned without it, but positions were still at chance after an hour.

    Args:
        predictions: Two of ``(B, T, 2)``, column and row, -1 to 1: from words after they attended to the image,
            and from the answer position after it attended to the words.
        text: ``(B, 6, T)`` from `samples.pack`.
        owner: ``(B, 576)``, the thing that each patch is labeled with.
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
    for values, truth, rows in zip(predictions, (where, answered), (one, alone), strict=True):
        loss = loss + ((values.float() - truth).square().mean(-1) * rows).sum() / rows.sum().clamp(min=1)
    return loss


def _coordinates(indices: Tensor) -> Tensor:
    """Return columns and rows of patches, -1 to 1: `(...)` to `(..., 2)`."""
    return torch.stack([indices % GRID, indices // GRID], dim=-1) * (2 / (GRID - 1)) - 1


def _together(number: Tensor) -> Tensor:
    """Return which tokens `(B, T)` belong to the same question, `(B, T, T)` bool."""
    return number[:, :, None] == number[:, None, :]


def _patches(named: Tensor, owner: Tensor) -> Tensor:
    """Return which patches `(B, K)` show what words `(B, T)` name, `(B, T, K)` bool."""
    things = owner[:, None, :].long()
    return (named[..., None].clamp(min=0) >> things.clamp(min=0) & 1).bool() & (things >= 0)


def _missing(logits: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
    """Return the mean surprisal, in nats, of the attention `(B, heads, T, C)` that `rows` pay to `wanted`."""
    shares = logits.float().log_softmax(-1).masked_fill(~wanted[:, None], NEVER).logsumexp((1, 3))
    shares = (shares - math.log(logits.shape[1])).masked_fill(~rows, 0.0)
    return -shares.sum() / rows.sum().clamp(min=1)


def answer_loss(logits: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of the packed answers.

    Args:
        logits: ``(B, T, V)`` logits.
        text: ``(B, 6, T)`` from `samples.pack`.

    Returns:
        The loss, and ``(B, T)`` bool: whether the next token has the largest logit.
    """
    target = text[:, 3].long()
    each = functional.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=NONE, reduction="none"
    ).view_as(target)
    answers = text[:, 4] != NONE
    weights = torch.where(answers, 1.0, _END_WEIGHT) * (target != NONE)
    weights = torch.where(text[:, 4] == TASK_IDS["count"], _COUNT_WEIGHT, weights)
    return (each * weights).sum() / weights.sum().clamp(min=1e-6), (logits.argmax(-1) == target).detach()

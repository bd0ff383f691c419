"""PruneSID: principal components group the tokens, suppression thins each group, groups share the budget.

Paper: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic
Importance-Diversity" (ICLR 2026), arXiv 2603.09480. Checked against the authors' LLaVA code (ZhengyaoFang/PruneSID
4ef17d96b3). T is the reference's budget, which includes the CLS token it always keeps. The families here have no
CLS row, so T = K + 1 and we select the other K.

1. Groups: ``Y = sigmoid(X)`` of the tower's tokens, centered; a token belongs to the one of the first
   ``T // 4`` principal components on which its loading ``|V|`` is largest. The code subtracts each token's mean
   over its features, the paper the mean token; we follow the code.
2. Score: CLS attention (the LLaVA code), or the loading on the token's own component (the paper, the Qwen code).
3. Threshold: ``tau = lambda * rho`` with rho the mean cosine of all pairs of X and ``lambda = T / 32``.
4. Suppression in each group, best score first: a kept token removes those with a cosine above tau.
5. Quotas: each group gets one token, and the rest in proportion to its survivors, within limits.
6. A group contributes its survivors first, then its other tokens, each by score.

Deviations:
* Exact eigenvectors of the token Gram (or of the feature Gram if that is smaller) in float64. The reference's
  randomized PCA gives a different set on every run: its Jaccard with itself is 0.2 to 0.7.
* Score ties go to the lowest index. One tie is left to torch's unstable sort, as in the reference: which of two
  groups with equally many survivors is first offered the tokens that limits held back. The order is fixed on one
  machine and may differ between types of processor; a stable sort would not reproduce the authors' sets.
* A component without variance has no direction and gets no token. There is at least one component, and at most
  as many as dimensions.
* One N x N matrix and group numbers; the reference builds one N x N matrix per group.
* A token that is not finite is a zero row: it is at the origin of Y and similar to no other token.
* Kept tokens stay in raster order. The reference returns them group by group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import cosine_gram, descending_order, finite_rows, quantized

Score = Literal["cls", "pc"]


@register
@dataclass(frozen=True, slots=True)
class PruneSID:
    """The best tokens of every principal component, without tokens too similar to them.

    Args:
        score: ``cls`` ranks tokens by attention, ``pc`` by their loading on their own component.
        lam: The paper's lambda per token of budget: ``tau = lam * T * rho``.
        group_tokens: Tokens of budget per principal component.
    """

    name: ClassVar[str] = "prunesid"
    needs: ClassVar[Need] = Need.PROJECTED | Need.ENCODER | Need.SALIENCY
    paper: ClassVar[str] = "arXiv 2603.09480"
    merges: ClassVar[bool] = False

    score: Score = "cls"
    lam: float = 1 / 32
    group_tokens: int = 4

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"lam must be finite and at least 0, got {self.lam}")
        if not isinstance(self.group_tokens, int) or isinstance(self.group_tokens, bool) or self.group_tokens < 1:
            raise ValueError(f"group_tokens must be an integer of at least 1, got {self.group_tokens!r}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens."""
        assert features.encoder is not None
        assert features.saliency is not None
        n, budget = features.tokens, keep + 1  # the reference's T counts CLS
        components = max(1, min(keep, budget // self.group_tokens))
        loadings = component_loadings(features.encoder, components)  # (N, G)
        own, group = quantized(loadings).max(dim=1)  # (N,) the first component wins a tie
        order = descending_order(features.saliency if self.score == "cls" else own)

        gram = cosine_gram(features.encoder)
        rho = (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
        similar = gram > self.lam * budget * rho + 1e-9  # rounding must not decide on equal tokens at tau = 1
        group, similar = group[order], similar[order][:, order]  # from here on, tokens are in order of score
        survives = suppress(similar & (group[:, None] == group[None, :]))

        groups = loadings.shape[1]
        members = torch.arange(groups, device=group.device)[:, None] == group[None, :]  # (G, N)
        quota = group_quotas(members.sum(dim=1), (members & survives).sum(dim=1), keep)
        lineup = torch.argsort(2 * group + (~survives).long(), stable=True)  # (N,) group by group, survivors first
        first = members.sum(dim=1).cumsum(dim=0) - members.sum(dim=1)  # (G,) start of each group in the lineup
        rank = torch.arange(n, device=group.device) - first[group[lineup]]  # (N,) rank within the group
        kept = order[lineup].masked_fill(rank >= quota[group[lineup]], n)
        return Selection(kept.sort().values[:keep])


def component_loadings(tokens: Tensor, components: int) -> Tensor:
    """Return the absolute right singular vectors of the centered sigmoid tokens, largest singular values first.

    Args:
        tokens: ``(N, D)`` tokens of the vision tower.
        components: Number of vectors to return; fewer if N or D is smaller.

    Returns:
        ``(N, G)`` float64. A component without variance is all zero.
    """
    y = torch.sigmoid(finite_rows(tokens))
    y = y - y.mean(dim=1, keepdim=True)
    wide = y.shape[0] <= y.shape[1]
    values, vectors = torch.linalg.eigh(y @ y.T if wide else y.T @ y)  # ascending
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    empty = values <= 1e-12 * values[0].clamp_min(1e-12)
    if not wide:
        vectors = y @ vectors / torch.where(empty, 1, values).sqrt()
    loadings: Tensor = vectors.abs().masked_fill(empty, 0)
    return loadings


def suppress(similar: Tensor) -> Tensor:
    """Return which tokens survive, ``(N,)`` bool: in order, each survivor removes later tokens similar to it.

    Args:
        similar: ``(N, N)`` bool, tokens in order of score.
    """
    dissimilar = ~similar
    survives = torch.ones_like(similar[0])
    for i in range(similar.shape[0] - 1):
        survives[i + 1 :] &= dissimilar[i, i + 1 :] | ~survives[i]
    return survives


def group_quotas(size: Tensor, survivors: Tensor, keep: int) -> Tensor:
    """Return how many tokens each group contributes, ``(G,)`` int64, summing to ``keep``.

    Args:
        size: ``(G,)`` members of each group, summing to more than ``keep``.
        survivors: ``(G,)`` members that survived suppression.
        keep: Number of tokens to distribute.
    """
    budget = keep + 1
    most = torch.minimum(survivors, size.clamp_max(5 * -(-budget // 64)))
    # Raise every limit by the same number, the smallest one with which the limits add up to the budget.
    raised = torch.minimum(most + torch.arange(budget + 1, device=size.device)[:, None], size)  # (T + 1, G)
    most = raised.index_select(0, (raised.sum(dim=1) < budget).sum()[None]).squeeze(0)
    least = size.clamp_max(1)
    rest = keep - least.sum()
    cumulative = (survivors.cumsum(dim=0) * rest).double() / survivors.sum()
    cumulative = cumulative.round().to(torch.int64)  # half to even
    quota = torch.minimum(least + cumulative.diff(prepend=cumulative.new_zeros(1)), most)
    # Tokens that the limits held back go to the groups with the most survivors, as far as their limits allow.
    order = torch.argsort(survivors, descending=True)  # unstable, like the reference's: see the deviations
    room = (most - quota)[order]
    extra = (keep - quota.sum() - (room.cumsum(dim=0) - room)).clamp_min(0).minimum(room)
    return quota.index_add(0, order, extra)

"""PruneSID: principal components group the tokens, suppression thins each group, groups share the budget.

Paper: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic
Importance-Diversity" (ICLR 2026), arXiv 2603.09480. Read against the authors' LLaVA code (ZhengyaoFang/PruneSID
4ef17d96b3). T is the reference's budget, which counts the CLS token it always keeps; the families here carry no
CLS row, so T = K + 1 and the K others are what we select.

1. Groups: ``Y = sigmoid(X)`` of the tower's tokens, centred; a token belongs to the one of the first
   ``T // 4`` principal components on which its loading ``|V|`` is largest. The code subtracts each token's mean
   over its features, the paper the mean token: we follow the code.
2. Score: CLS attention (the LLaVA code), or the loading on the token's own component (the paper, the Qwen code).
3. Threshold: ``tau = lambda * rho`` with rho the mean cosine of all pairs of X and ``lambda = T / 32``.
4. Suppression in each group, best score first: a kept token removes those with a cosine above tau.
5. Quotas: each group gets one token, the rest follows the numbers that survived suppression, within limits.
6. A group gives its survivors first, then the others, by score.

Deviations:
* Exact eigenvectors of the token Gram (or of the feature Gram where that is smaller) in float64. The
  reference's randomised PCA gives another set on every run: its Jaccard with itself is 0.2 to 0.7.
* Score ties go to the lowest index. One tie is left to torch's unstable sort, as the reference leaves it: which
  of two groups with equally many survivors is first offered the places that limits held back. The order is fixed
  on one machine and may differ between kinds of processor; a stable one would disagree with the authors' sets.
* A component without variance has no direction of its own and gets no token. At least one component, at most
  as many as there are dimensions.
* One N x N matrix and group numbers; the reference builds one N x N matrix per group.
* A token that is not finite is a zero row: it stands at the origin of Y and resembles nobody.
* Kept tokens stay in raster order. The reference hands them over group by group.
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
from promprune_vllm.kernels.ops import cosine_gram, descending_order, finite_rows, settled

Score = Literal["cls", "pc"]


@register
@dataclass(frozen=True, slots=True)
class PruneSID:
    """The best tokens of every principal component, thinned of what resembles them.

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
        own, group = settled(loadings).max(dim=1)  # (N,) the first component wins a tie
        order = descending_order(features.saliency if self.score == "cls" else own)

        gram = cosine_gram(features.encoder)
        rho = (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
        similar = gram > self.lam * budget * rho + 1e-9  # equal tokens at tau = 1 are not for rounding to decide
        group, similar = group[order], similar[order][:, order]  # from here on, tokens stand in order of score
        survives = suppress(similar & (group[:, None] == group[None, :]))

        groups = loadings.shape[1]
        members = torch.arange(groups, device=group.device)[:, None] == group[None, :]  # (G, N)
        quota = group_quotas(members.sum(dim=1), (members & survives).sum(dim=1), keep)
        lineup = torch.argsort(2 * group + (~survives).long(), stable=True)  # (N,) group by group, survivors first
        first = members.sum(dim=1).cumsum(dim=0) - members.sum(dim=1)  # (G,) where a group starts in it
        place = torch.arange(n, device=group.device) - first[group[lineup]]
        kept = order[lineup].masked_fill(place >= quota[group[lineup]], n)
        return Selection(kept.sort().values[:keep])


def component_loadings(tokens: Tensor, components: int) -> Tensor:
    """Absolute right singular vectors of the centred sigmoid tokens, largest singular values first.

    Args:
        tokens: ``(N, D)`` tokens of the vision tower.
        components: How many to return; fewer where N or D is smaller.

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
    """Return who survives, ``(N,)``: going down the tokens, each survivor removes later ones similar to it.

    Args:
        similar: ``(N, N)`` bool, tokens in order of score.
    """
    spared = ~similar
    survives = torch.ones_like(similar[0])
    for i in range(similar.shape[0] - 1):
        survives[i + 1 :] &= spared[i, i + 1 :] | ~survives[i]
    return survives


def group_quotas(size: Tensor, survivors: Tensor, keep: int) -> Tensor:
    """How many tokens each group gives, ``(G,)`` int64, summing to ``keep``.

    Args:
        size: ``(G,)`` members of each group, summing to more than ``keep``.
        survivors: ``(G,)`` members that survived suppression.
        keep: Tokens to give out.
    """
    budget = keep + 1
    most = torch.minimum(survivors, size.clamp_max(5 * -(-budget // 64)))
    # Raise every limit by the same number, the smallest that makes room for the budget.
    raised = torch.minimum(most + torch.arange(budget + 1, device=size.device)[:, None], size)  # (T + 1, G)
    most = raised.index_select(0, (raised.sum(dim=1) < budget).sum()[None]).squeeze(0)
    least = size.clamp_max(1)
    rest = keep - least.sum()
    reached = (survivors.cumsum(dim=0) * rest).double() / survivors.sum()
    reached = reached.round().to(torch.int64)  # half to even
    quota = torch.minimum(least + reached.diff(prepend=reached.new_zeros(1)), most)
    # What the limits held back goes to the groups with the most survivors, as far as their limits allow.
    turn = torch.argsort(survivors, descending=True)  # unstable like the reference's: see the deviations
    room = (most - quota)[turn]
    extra = (keep - quota.sum() - (room.cumsum(dim=0) - room)).clamp_min(0).minimum(room)
    return quota.index_add(0, turn, extra)

"""CDPruner: a determinantal point process over the tokens, conditioned on their relevance to the text.

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
arXiv 2506.10967. Read against the authors' code (Theia-4869/CDPruner 9541616c40) and OpenVINO GenAI's.

1. Relevance of a token: r is its mean cosine to the rows of the text, scaled to
   ``(r - min r + 1e-6) / (max r - min r)``.
2. Kernel: ``diag(r) K0 diag(r)`` with K0 the cosines of the projected tokens.
3. Greedy MAP from the token of largest ``r**2``.

There are two published forms of relevance. The authors compare CLIP's projection of the patches with CLIP's text
tower and take the mean cosine with a **minus** sign. Language models load neither, so OpenVINO compares the
projected tokens with the language model's own embeddings of the prompt, by default with a plus sign. We use
OpenVINO's inputs and ``sign=1`` by default. The steps are the same functions for both.

Deviations:
* Volumes are tracked as in ``greedy_dpp``, in float64; the reference takes the square root of an unguarded
  difference and can repeat tokens or give NaN if tokens repeat. Once all volume is explained, the rest is filled
  by relevance.
* Without any text, or if all tokens are equally relevant, the kernel is K0 alone; the reference divides by 0.
* Zero rows and rows that are not finite have cosine 0 with everything and are kept last. Such rows of text shift
  the relevance of every token by the same factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.registry import register
from promprune_vllm.core.selection import Selection
from promprune_vllm.kernels.ops import cosine_gram, cross_cosine, descending_order, greedy_dpp, quantized


@register
@dataclass(frozen=True, slots=True)
class CDPruner:
    """Diverse tokens, weighted by their relevance to the text.

    Args:
        sign: 1 prefers the tokens most similar to the text, -1 the least similar.
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[Need] = Need.PROJECTED | Need.TEXT
    paper: ClassVar[str] = "arXiv 2506.10967"
    merges: ClassVar[bool] = False

    sign: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.sign, bool) or self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {self.sign!r}")

    def select(self, features: VisionFeatures, keep: int) -> Selection:
        """Keep ``keep`` tokens."""
        assert features.text is not None
        relevance = text_relevance(features.projected, features.text, sign=self.sign)
        picks = conditional_dpp(cosine_gram(features.projected), relevance, keep)
        return Selection(picks.sort().values)


def text_relevance(tokens: Tensor, text: Tensor, *, sign: int = 1) -> Tensor:
    """Return each token's relevance to a text.

    Args:
        tokens: ``(N, D)`` visual tokens.
        text: ``(M, D)`` embeddings in the same space.
        sign: -1 reverses the ranking, as the authors' code does.

    Returns:
        ``(N,)`` float64, from about 0 for the least relevant to 1; all 1 if M = 0 or all are equally relevant.
    """
    if text.shape[0] == 0:
        return tokens.new_ones(tokens.shape[0], dtype=torch.float64)
    r = sign * cross_cosine(tokens, text).mean(dim=1)
    excess = r - r.amin()
    span = excess.amax()
    return torch.where(span > 1e-9, (excess + 1e-6) / torch.where(span > 1e-9, span, 1), 1)


def conditional_dpp(gram: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """Select by greedy MAP of the DPP with kernel ``diag(relevance) gram diag(relevance)``.

    Args:
        gram: ``(N, N)`` cosines.
        relevance: ``(N,)`` at least 0.
        keep: Size of the set, ``1 <= keep < N``.

    Returns:
        ``(keep,)`` int64, in the order in which they were chosen.
    """
    order = descending_order(quantized(relevance))
    return greedy_dpp(gram, order, order.new_zeros(()), keep, quality=relevance)

"""``--mm-encoder-tp-mode data``: each tensor-parallel rank encodes some of the images, and knows only those.

vLLM hands every rank the encoder's output of all images. What was captured on the way takes the same road here, so
that all ranks select by the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models.vision import get_load_balance_assignment

Captured = Mapping[str, Sequence[Tensor]]
"""Tensors by name, one for each of some images."""


class Shares:
    """Who encodes which images of a call.

    Args:
        patches: Of each image.
        sharded: Whether each rank has its own images; else every rank has all.

    Attributes:
        own: This rank's images, in the order in which its tower sees them.
    """

    def __init__(self, patches: Sequence[int], *, sharded: bool) -> None:
        self._patches = patches
        self._by_rank: list[list[int]] | None = None
        self.own = [*range(len(patches))]
        if sharded:
            group = get_tp_group()
            order, counts, _ = get_load_balance_assignment([*patches], group.world_size)  # vLLM's own
            images = iter(order)
            self._by_rank = [[next(images) for _ in range(count)] for count in counts]
            self.own = self._by_rank[group.rank_in_group]

    def exchange(self, captured: Captured, device: torch.device) -> Captured:
        """Return what all ranks captured, image by image. Every rank must call it.

        Args:
            captured: ``(P_i, ...)`` of this rank's images, in their order.
            device: Of the encoder.
        """
        if self._by_rank is None:
            return captured
        group = get_tp_group()
        mine = {name: torch.cat([*tensors]) for name, tensors in captured.items()}
        # A rank without images does not know what there is to come.
        told: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in self._by_rank]
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in mine.items()}
        torch.distributed.all_gather_object(told, shapes, group=group.cpu_group)
        found: dict[str, dict[int, Tensor]] = {}
        for rank, images in enumerate(self._by_rank):
            for name, (shape, dtype) in told[rank].items():
                own = rank == group.rank_in_group
                tensor = mine[name] if own else torch.empty(shape, dtype=dtype, device=device)
                parts = torch.split(group.broadcast(tensor, src=rank), [self._patches[i] for i in images])
                found.setdefault(name, {}).update(zip(images, parts, strict=True))
        return {name: [by_image[i] for i in sorted(by_image)] for name, by_image in found.items()}

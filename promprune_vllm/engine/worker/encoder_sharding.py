"""``--mm-encoder-tp-mode data``: each tensor-parallel rank encodes only some of the images.

vLLM gives every rank the encoder's output for all images. This module does the same with the captured features, so
that all ranks select from the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models.vision import get_load_balance_assignment

Captured = Mapping[str, Sequence[Tensor]]
"""Feature name -> tensors, one per image."""


class Shares:
    """Which rank encodes which images of a call.

    Args:
        patches: Number of patches of each image.
        sharded: Whether each rank encodes its own images; otherwise every rank encodes all.

    Attributes:
        own: Indices of this rank's images, in the order in which its tower gets them.
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
        """Return the features that all ranks captured, one tensor per image. Every rank must call this.

        Args:
            captured: ``(P_i, ...)`` per image of this rank, in the order of ``own``.
            device: The encoder's device.
        """
        if self._by_rank is None:
            return captured
        group = get_tp_group()
        own = {name: torch.cat([*tensors]) for name, tensors in captured.items()}
        # All ranks need the shapes: one without images has captured nothing, but must receive the others' tensors.
        shapes_by_rank: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in self._by_rank]
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        torch.distributed.all_gather_object(shapes_by_rank, shapes, group=group.cpu_group)
        gathered: dict[str, dict[int, Tensor]] = {}
        for rank, images in enumerate(self._by_rank):
            for name, (shape, dtype) in shapes_by_rank[rank].items():
                is_own = rank == group.rank_in_group
                tensor = own[name] if is_own else torch.empty(shape, dtype=dtype, device=device)
                parts = torch.split(group.broadcast(tensor, src=rank), [self._patches[i] for i in images])
                gathered.setdefault(name, {}).update(zip(images, parts, strict=True))
        return {name: [by_image[i] for i in sorted(by_image)] for name, by_image in gathered.items()}

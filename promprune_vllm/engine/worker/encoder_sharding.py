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


def share_images(patches: Sequence[int], *, sharded: bool) -> Shares:
    """Share images as vLLM does for towers that take images of any size.

    Args:
        patches: Number of patches of each image.
        sharded: Whether each rank encodes its own images; otherwise every rank encodes all.
    """
    if not sharded:
        return Shares(patches, None)
    order, counts, _ = get_load_balance_assignment([*patches], get_tp_group().world_size)  # vLLM's own
    images = iter(order)
    return Shares(patches, [[next(images) for _ in range(count)] for count in counts])


def share_tiles(tiles: int, patches: int, *, sharded: bool) -> Shares:
    """Share tiles of one size as ``run_dp_sharded_vision_model`` does: evenly, the last ranks with fewer or none.

    vLLM gives a rank with fewer tiles empty ones, after its own.

    Args:
        tiles: Number of tiles.
        patches: Patches per tile.
        sharded: Whether each rank encodes its own tiles; otherwise every rank encodes all.
    """
    if not sharded:
        return Shares([patches] * tiles, None)
    ranks = get_tp_group().world_size
    each = -(-tiles // ranks)
    by_rank = [[*range(tiles)][rank * each : (rank + 1) * each] for rank in range(ranks)]
    return Shares([patches] * tiles, by_rank)


class Shares:
    """Which rank encodes which images, or tiles, of a call.

    Args:
        patches: Number of patches of each image.
        by_rank: Indices of each rank's images, in the order in which its tower gets them; ``None`` if every rank
            encodes all.

    Attributes:
        own: Indices of this rank's images.
    """

    def __init__(self, patches: Sequence[int], by_rank: Sequence[Sequence[int]] | None) -> None:
        self._patches = patches
        self._by_rank = by_rank
        self.own = [*range(len(patches))] if by_rank is None else by_rank[get_tp_group().rank_in_group]

    def exchange(self, captured: Captured, device: torch.device) -> Captured:
        """Return the features that all ranks captured, one tensor per image. Every rank must call this.

        Args:
            captured: ``(P_i, ...)`` per image of this rank, in the order of ``own``; none if it has no images.
            device: The encoder's device.
        """
        if self._by_rank is None:
            return captured
        group = get_tp_group()
        own = {name: torch.cat([*tensors]) for name, tensors in captured.items() if tensors}
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

"""Shared code of the families whose tower encodes square tiles: LLaVA and InternVL.

The budget covers a whole image. It is divided among its tiles in proportion to their valid tokens, and each tile
is pruned separately (``PROMPRUNE_TILES`` has other modes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine.worker.device_copies import copy_to_device
from promprune_vllm.engine.worker.encoded_image import EncodedImage, Group
from promprune_vllm.engine.worker.encoder_sharding import share_tiles
from promprune_vllm.engine.worker.patch_merge import PatchMerge
from promprune_vllm.engine.worker.tower_hooks import ClassToken, attention_features, encoder_rows


class TileTowerMixin:
    """Captures features of tiles of ``image_size`` pixels; comes before vLLM's model class."""

    merge = PatchMerge(side=1, in_raster_order=True)
    class_token: ClassVar[ClassToken | None] = ClassToken.FIRST

    def saliency_layer(self) -> Any:
        """Return the attention layer that gives the saliency."""
        raise NotImplementedError

    def projector(self) -> Any:
        """Return the module that projects ``(T, n, Dv)`` rows of the tower to ``(T, n, D)``."""
        raise NotImplementedError

    def embed_tiles(self, pixels: Tensor) -> Sequence[Tensor] | Tensor:
        """Encode and project ``(T, 3, H, W)`` tiles to ``(T, n, D)``, without pruning."""
        raise NotImplementedError

    def patches_per_side(self) -> int:
        """Return the patches of a tile along each axis."""
        config = self.config.vision_config  # type: ignore[attr-defined]
        return int(config.image_size) // int(config.patch_size)

    def tile_features(self, pixels: Tensor, needs: Need) -> list[VisionFeatures]:
        """Encode tiles and return the features of each.

        Args:
            pixels: ``(T, 3, H, W)``.
            needs: Features to capture.
        """
        side = self.patches_per_side()
        shares = share_tiles(len(pixels), side**2, sharded=bool(getattr(self, "use_data_parallel", False)))
        layer = self.saliency_layer()
        with (
            attention_features(layer, needs, class_token=self.class_token) as own,
            encoder_rows(self.projector(), needs) as encoder,
        ):
            projected = self.embed_tiles(pixels)  # (T, n, D)
        captured = shares.exchange({name: tiles[: len(shares.own)] for name, tiles in own.items()}, pixels.device)
        per_side = side // self.merge.side
        return [
            VisionFeatures(
                projected=rows,
                grid=(1, per_side, per_side),
                encoder=encoder[0][i] if Need.ENCODER in needs else None,
                **{name: self.of_tokens(tiles[i], side) for name, tiles in captured.items()},
            )
            for i, rows in enumerate(projected)
        ]

    def of_tokens(self, patches: Tensor, side: int) -> Tensor:
        """Return ``(n, ...)`` values of a tile's tokens from ``(side * side, ...)`` values of its patches."""
        return self.merge.mean(patches, side)

    def video_of_frames(self, frames: Sequence[VisionFeatures], *newlines: Tensor) -> EncodedImage:
        """Return a video, each of whose frames is a tile.

        Args:
            frames: Its T frames, each with n tokens.
            newlines: ``(D,)`` rows behind all frames that show nothing of them.
        """
        rows = torch.cat([*(frame.projected for frame in frames), *(row[None] for row in newlines)])
        *places, last = torch.split(
            torch.arange(len(rows), device=rows.device), [*(frame.tokens for frame in frames), len(newlines)]
        )
        groups = [Group(frame, place) for frame, place in zip(frames, places, strict=True)]
        return EncodedImage(rows, groups, last, is_video=True)

    def image_of_tiles(
        self, rows: Tensor, tiles: Sequence[VisionFeatures], source: Tensor, *, whole: int
    ) -> EncodedImage:
        """Return an image with its groups.

        Args:
            rows: ``(N, D)`` of the image, as vLLM gives them to the language model.
            tiles: Its tiles, each with n tokens.
            source: ``(N,)`` int64 on the CPU, ``tile * n + token`` that each row is from, or -1 for a newline.
            whole: The tile that shows the whole image.
        """
        groups = [_merge_tiles(tiles, source)] if self.merges_tiles() else _tile_groups(tiles, source)
        return EncodedImage(rows, self.with_entropy(groups, tiles[whole]), indices(source < 0, rows.device))

    def merges_tiles(self) -> bool:
        """Return whether all tiles of an image are one group."""
        model: Any = self
        return bool(model._settings.tiles == "merged")

    def with_entropy(self, groups: Sequence[Group], whole: VisionFeatures) -> Sequence[Group]:
        """Return an image's groups with the entropy of the tile that shows all of it, if the settings say so."""
        model: Any = self
        if model._settings.tiles != "base":
            return groups
        # The settings allow this only for PromPrune, which has an entropy.
        entropy = model._methods[0].entropy_of(whole)
        return [Group(replace(group.features, entropy=entropy), group.positions) for group in groups]

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, Dv)`` rows that a method merged before the projector, to ``(K, D)``."""
        projected: Tensor = self.projector()(rows)
        return projected


def _tile_groups(tiles: Sequence[VisionFeatures], source: Tensor) -> list[Group]:
    """Return one group per tile with valid tokens; these form a rectangle in the tile."""
    groups = []
    for i, tile in enumerate(tiles):
        in_tile = (source >= i * tile.tokens) & (source < (i + 1) * tile.tokens)
        tokens = source[in_tile] - i * tile.tokens
        if tokens.numel():
            side = tile.grid[2]
            height = int(tokens[-1] // side - tokens[0] // side) + 1
            grid = (1, height, tokens.numel() // height)
            device = tile.projected.device
            groups.append(Group(tile.take(copy_to_device(tokens, device), grid), indices(in_tile, device)))
    return groups


def _merge_tiles(tiles: Sequence[VisionFeatures], source: Tensor) -> Group:
    """Return all tiles as one group in the order of the prompt, with a grid of a single row."""
    shares = [
        # Divided by the total that CLS pays to their tile, the saliencies of different tiles are comparable.
        replace(tile, saliency=None if tile.saliency is None else tile.saliency / tile.saliency.sum())
        for tile in tiles
    ]
    joined = VisionFeatures.join(shares)
    device = joined.projected.device
    visual = copy_to_device(source[source >= 0], device)
    return Group(joined.take(visual, (1, 1, visual.numel())), indices(source >= 0, device))


def indices(mask: Tensor, device: torch.device) -> Tensor:
    """Return where a mask on the CPU is true, as int64 on a device."""
    return copy_to_device(mask.nonzero().flatten(), device)

"""Shared code of the Qwen-VL families: the processor's counts, and the features of their towers.

These towers have no CLS token. The saliency of a patch is the attention that it receives from all patches of its
image in the last block with full attention. The saliency of a visual token is the mean over its 2 x 2 patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from promprune_vllm.core import geometry
from promprune_vllm.core.budget import FIELD
from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.positions import require_rows
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.keys import SUMMARY
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.encoder_graphs import keep_eager
from promprune_vllm.engine.worker.encoder_sharding import Captured, Shares
from promprune_vllm.engine.worker.mrope import MRopePrunedMixin
from promprune_vllm.engine.worker.tower_hooks import inputs_of, patch_attention
from promprune_vllm.errors import BudgetError


class PrunedQwenProcessorMixin(PrunedProcessorMixin):
    """Placeholders of K tokens."""

    supplies = Need.PROJECTED | Need.ENCODER | Need.KEYS | Need.SALIENCY

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        result = super().apply(inputs, timing_ctx)
        summary, placeholders = result.get(SUMMARY), result["mm_placeholders"].get("image")
        if not summary or summary.images[-1].kept == summary.images[-1].total:
            return result
        with refusing(self.info.ctx.model_config):
            # The next position follows from the image's last row and column, which may have been dropped.
            if placeholders[-1].offset + placeholders[-1].length == len(result["prompt_token_ids"]):
                raise BudgetError(
                    f"{FIELD} cannot be applied to an image that ends the prompt: put text or the token "
                    "<|vision_end|> after it, as chat templates do.",
                    reason="unsupported",
                )
        return result

    def check_kept(self, images: Any, counts: Sequence[tuple[int, int]], kwargs: Mapping[str, object]) -> None:
        """Refuse images whose positions could exceed the model's rotary table."""
        if any(kept < total for total, kept in counts):
            # An image of unknown size keeps every token, and takes at most as many positions.
            positions_and_kept = [
                (max(self._grid(size.width, size.height, kwargs)) if size else kept, kept)
                for size, (_, kept) in zip(images.sizes, counts, strict=True)
            ]
            require_rows(positions_and_kept, self.info.ctx.model_config.max_model_len)

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:
        """Return how many visual tokens an image has in vLLM."""
        info: Any = self.info
        size = images.get_image_size(index)
        return int(
            info.get_num_image_tokens(
                image_width=size.width,
                image_height=size.height,
                image_processor=info.get_image_processor(**kwargs),
                mm_kwargs=kwargs,
            )
        )

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Return the pixel box of each visual token; vLLM resizes the image to a multiple of a token's size."""
        whole = (0.0, 0.0, float(width), float(height))
        return list(geometry.grid(*self._grid(width, height, {}), whole))

    def _grid(self, width: int, height: int, kwargs: Mapping[str, object]) -> tuple[int, int]:
        """Return the rows and columns of an image's grid of tokens."""
        info: Any = self.info
        resized, _ = info._get_vision_info(
            image_width=width,
            image_height=height,
            image_processor=info.get_image_processor(**kwargs),
            mm_kwargs=kwargs,
        )
        config = info.get_hf_config().vision_config
        side = config.patch_size * config.spatial_merge_size
        return resized.height // side, resized.width // side

    def embedded_tokens(self, images: Any, index: int) -> int:
        """Return how many tokens an image sent as ``image_embeds`` has."""
        merge: int = self.info.get_hf_config().vision_config.spatial_merge_size
        return int(images.get(index)["image_grid_thw"].prod()) // merge**2


class PrunedQwenMixin(MRopePrunedMixin):
    """Captures features of a Qwen-VL tower; comes before vLLM's model class."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self._prunes:
            keep_eager((self.visual.blocks[self.saliency_block()], self.visual.merger))

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images and return them with the requested features.

        Args:
            inputs: ``pixel_values`` of ``(P, C)``, the patches of all B images one after the other, and
                ``image_grid_thw`` ``(B, 3)``, each image's grid of patches.
            items: Which of the B images.
            needs: Features to capture.
        """
        grids = inputs["image_grid_thw"]
        counts = grids.prod(-1).tolist()  # patches per image
        start = sum(counts[: items.start])
        counts = counts[items]
        pixels = inputs["pixel_values"][start : start + sum(counts)]
        rows, captured = self._encode(pixels, grids[items], counts, needs)
        return [
            self._image(rows[i], grid, {name: values[i] for name, values in captured.items()})
            for i, grid in enumerate(grids[items].tolist())
        ]

    def _encode(
        self, pixels: Tensor, grids: Tensor, counts: Sequence[int], needs: Need
    ) -> tuple[Sequence[Tensor], Captured]:
        """Return the rows of each image, and the captured features of its patches."""
        shares = Shares(counts, sharded=self.use_data_parallel)
        own = [counts[i] for i in shares.own]
        attention = self.visual.blocks[self.saliency_block()].attn
        with patch_attention(attention, needs, own) as captured, inputs_of(self.merger_norm()) as merged:
            rows = self.embed_unpruned(pixel_values=pixels, image_grid_thw=grids)
        if Need.ENCODER in needs and own:
            captured["encoder"] = [*torch.split(merged[0].flatten(0, -2), own)]  # (P, Dv) per image
        return rows, shares.exchange(captured, pixels.device)

    def saliency_block(self) -> int:
        """Return the index of the block whose attention gives the saliency."""
        return -1

    def merger_norm(self) -> Any:
        """Return the module that gets the merger's input; the merger itself may be compiled and ignore hooks."""
        return self.visual.merger.ln_q

    def projected_width(self) -> int:
        """Return the width D of a visual token."""
        return int(self.visual.out_hidden_size)

    def in_raster_order(self, values: Tensor, grid: list[int]) -> Tensor:  # noqa: ARG002
        """Reorder ``(N, ...)`` values of an image from the tower's order of tokens to raster order."""
        return values

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, 4 * Dv)`` rows, each with a token's four patches side by side, to ``(K, D)`` tokens."""
        tower: Any = self.visual
        patches = rows.reshape(len(rows) * tower.spatial_merge_size**2, -1)
        projected: Tensor = tower.merger(patches)
        return projected

    def _image(self, rows: Tensor, grid: list[int], captured: Mapping[str, Tensor]) -> EncodedImage:
        merge: int = self.visual.spatial_merge_size
        features = {}
        for name, values in captured.items():
            patches = values.reshape(-1, merge**2, *values.shape[1:])  # (N, 4, ...)
            # A token has the mean of its patches; its encoder features are side by side, as the merger reads them.
            tokens = patches.flatten(1) if name == "encoder" else patches.mean(dim=1)
            features[name] = self.in_raster_order(tokens, grid)
        shape = (grid[0], grid[1] // merge, grid[2] // merge)
        projected = rows[:, : self.projected_width()]
        return EncodedImage.whole(rows, VisionFeatures(projected=projected, grid=shape, **features))


class PrunedQwen3Mixin(PrunedQwenMixin):
    """The same for towers of Qwen3-VL's kind, whose rows also have the DeepStack rows of earlier blocks."""

    def merger_norm(self) -> Any:
        """Return the module that gets the merger's input."""
        return self.visual.merger.norm

    def projected_width(self) -> int:
        """Return the width D of a visual token, without its DeepStack rows."""
        return self.visual_dim

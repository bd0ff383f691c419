"""What the Qwen-VL families share: the processor's counts, and what a method may look at of their towers.

These towers have no CLS token. A patch is as salient as the attention it gets from all patches of its image in the
last block in which all of them see each other, and a visual token as the mean of the 2 x 2 patches merged into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from promprune_vllm.core import geometry
from promprune_vllm.core.budget import FIELD
from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.engine.capture import inputs_of, patch_attention
from promprune_vllm.engine.image import EncodedImage
from promprune_vllm.engine.mrope import MRopePrunedMixin
from promprune_vllm.engine.plan import SUMMARY
from promprune_vllm.engine.processor import PrunedProcessorMixin
from promprune_vllm.engine.request import refusing
from promprune_vllm.errors import BudgetError


class PrunedQwenProcessorMixin(PrunedProcessorMixin):
    """Placeholders of K tokens."""

    supplies = Need.PROJECTED | Need.ENCODER | Need.KEYS | Need.SALIENCY

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        result = super().apply(inputs, timing_ctx)
        summary, places = result.get(SUMMARY), result["mm_placeholders"].get("image")
        if not summary or summary.images[-1].kept == summary.images[-1].seen:
            return result
        with refusing(self.info.ctx.model_config.served_model_name):  # type: ignore[attr-defined]
            # What comes behind an image starts behind its last row and column, which may have been dropped.
            if places[-1].offset + places[-1].length == len(result["prompt_token_ids"]):
                raise BudgetError(
                    f"{FIELD} cannot be applied to an image that ends the prompt: put text or the token "
                    "<|vision_end|> behind it, as chat templates do.",
                    reason="unsupported",
                )
        return result

    def _image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:
        info: Any = self.info  # type: ignore[attr-defined]
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
        """Where on the image each of its tokens looks: it is stretched to a multiple of their size."""
        info: Any = self.info  # type: ignore[attr-defined]
        size, _ = info._get_vision_info(
            image_width=width, image_height=height, image_processor=info.get_image_processor(), mm_kwargs={}
        )
        config = info.get_hf_config().vision_config
        side = config.patch_size * config.spatial_merge_size
        whole = (0.0, 0.0, float(width), float(height))
        return list(geometry.grid(size.height // side, size.width // side, whole))

    def _embedded_tokens(self, images: Any, index: int) -> int:
        merge: int = self.info.get_hf_config().vision_config.spatial_merge_size  # type: ignore[attr-defined]
        return int(images.get(index)["image_grid_thw"].prod()) // merge**2


class PrunedQwenMixin(MRopePrunedMixin):
    """Captures images of a Qwen-VL tower; goes before vLLM's model class."""

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images and return what a method may look at.

        Args:
            inputs: ``pixel_values`` of ``(P, C)``, the patches of all B images one after the other, and
                ``image_grid_thw`` ``(B, 3)``, each image's grid of patches.
            items: Which of the B images.
            needs: What the method asks for.
        """
        grids = inputs["image_grid_thw"]
        counts = grids.prod(-1).tolist()  # patches per image
        start = sum(counts[: items.start])
        counts = counts[items]
        pixels = inputs["pixel_values"][start : start + sum(counts)]
        tower: Any = self.visual  # type: ignore[attr-defined]
        attention = tower.blocks[self.saliency_block()].attn
        with patch_attention(attention, needs, counts) as captured, inputs_of(self.merger_norm()) as merged:
            embeddings = self.embed_unpruned(pixel_values=pixels, image_grid_thw=grids[items])
        encoder = torch.split(merged[0].flatten(0, -2), counts)  # (P, Dv) per image
        images = []
        for i, (rows, grid) in enumerate(zip(embeddings, grids[items].tolist(), strict=True)):
            found = {name: self._per_token(values[i], grid) for name, values in captured.items()}
            if Need.ENCODER in needs:
                tokens = encoder[i].reshape(len(rows), -1)  # (N, 4 * Dv), the patches of a token side by side
                found["encoder"] = self.in_raster_order(tokens, grid)
            images.append(self._image(rows, grid, found))
        return images

    def saliency_block(self) -> int:
        """Which block's attention saliency comes from."""
        return -1

    def merger_norm(self) -> Any:
        """Return the module whose input is the merger's: the merger itself may be compiled, and deaf to hooks."""
        return self.visual.merger.ln_q  # type: ignore[attr-defined]

    def projected_width(self) -> int:
        """Width D of a visual token."""
        return int(self.visual.out_hidden_size)  # type: ignore[attr-defined]

    def in_raster_order(self, values: Tensor, grid: list[int]) -> Tensor:  # noqa: ARG002
        """Bring ``(N, ...)`` values of an image from the tower's order of tokens into raster order."""
        return values

    def project(self, rows: Tensor) -> Tensor:
        """Merge ``(K, 4 * Dv)`` patches, four side by side, into ``(K, D)`` tokens."""
        tower: Any = self.visual  # type: ignore[attr-defined]
        patches = rows.reshape(len(rows) * tower.spatial_merge_size**2, -1)
        projected: Tensor = tower.merger(patches)
        return projected

    def _per_token(self, values: Tensor, grid: list[int]) -> Tensor:
        """Average ``(P, ...)`` values of patches over each token's, in raster order."""
        merge: int = self.visual.spatial_merge_size  # type: ignore[attr-defined]
        return self.in_raster_order(values.reshape(-1, merge**2, *values.shape[1:]).mean(dim=1), grid)

    def _image(self, rows: Tensor, grid: list[int], found: Mapping[str, Tensor]) -> EncodedImage:
        merge: int = self.visual.spatial_merge_size  # type: ignore[attr-defined]
        shape = (grid[0], grid[1] // merge, grid[2] // merge)
        projected = rows[:, : self.projected_width()]
        return EncodedImage.whole(rows, VisionFeatures(projected=projected, grid=shape, **found))

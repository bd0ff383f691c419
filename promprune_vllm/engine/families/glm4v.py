"""GLM-4.1V to 4.6V: full attention in every block of the tower, a convolution that merges patches, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.glm4v.image_processing_glm4v import smart_resize
from vllm.model_executor.models import glm4_1v as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.patch_tower import PatchTowerMixin, PatchTowerProcessorMixin
from promprune_vllm.engine.worker.mrope import unsupported_reason

__all__ = ["PrunedGlm4v", "unsupported_reason"]
seams.require(parts.GLM4V)


class PrunedGlm4vProcessor(PatchTowerProcessorMixin, upstream.Glm4vMultiModalProcessor):
    """Placeholders of K tokens."""

    end_token = "<|end_of_image|>"

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:
        """Return how many visual tokens an image has."""
        size = images.get_image_size(index)
        rows, columns = self.token_grid(size.width, size.height, kwargs)
        return rows * columns

    def token_grid(self, width: int, height: int, kwargs: Mapping[str, object]) -> tuple[int, int]:
        """Return the rows and columns of an image's grid of tokens, as the image processor resizes it.

        vLLM's own function overlooks the request's options and the least number of pixels.
        """
        images = self.info.get_image_processor(**kwargs)
        size = self.image_options(kwargs).get("size")
        given = size if isinstance(size, Mapping) else {}  # transformers refuses anything else
        side = images.patch_size * images.merge_size
        high, wide = smart_resize(
            num_frames=images.temporal_patch_size,
            height=height,
            width=width,
            temporal_factor=images.temporal_patch_size,
            factor=side * getattr(images, "patch_expand_factor", 1),  # of transformers' GLMGA
            min_pixels=given.get("shortest_edge") or images.size["shortest_edge"],
            max_pixels=given.get("longest_edge") or images.size["longest_edge"],
        )
        return high // side, wide // side


class PrunedGlm4vMixin(PatchTowerMixin):
    """Captures features of a GLM-V tower; comes before vLLM's model class."""

    def token_of(self, kind: str) -> int:  # noqa: ARG002
        """Return the token in whose place embeddings are put: the frames of a video have images' tokens."""
        return int(self.config.image_token_id)

    def frame_start(self) -> int:
        """Return the token before the visual tokens of each frame of a video."""
        return int(self.config.image_start_token_id)

    def projector(self) -> Any:
        """Return the convolution."""
        return self.visual.downsample

    def patch_rows(self, inputs: Tensor) -> Tensor:
        """Return the ``(P, Dv)`` rows of patches in ``(N, Dv, 2, 2)`` squares."""
        return inputs.permute(0, 2, 3, 1).flatten(0, 2)

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, 4 * Dv)`` rows, each with a token's four patches side by side, to ``(K, D)`` tokens."""
        tower, side = self.visual, self._merge.side
        squares = rows.reshape(len(rows), side, side, -1).permute(0, 3, 1, 2)
        projected: Tensor = tower.merger(tower.downsample(squares).flatten(1))
        return projected


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlm4vProcessor, info=upstream.Glm4vProcessingInfo, dummy_inputs=upstream.Glm4vDummyInputsBuilder
)
class PrunedGlm4v(PrunedGlm4vMixin, upstream.Glm4vForConditionalGeneration):
    """GLM-4.1V whose ``embed_multimodal`` returns K rows per image."""

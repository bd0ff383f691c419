"""InternVL 3 and 3.5 in the layout of transformers ("-HF")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from vllm.model_executor.models import interns1 as upstream
from vllm.multimodal import MULTIMODAL_REGISTRY

from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.families.internvl_tower import InternVLMixin, InternVLProcessorMixin, unsupported_reason

__all__ = ["PrunedInternVL", "unsupported_reason"]
seams.require(parts.INTERNVL)


class PrunedInternVLProcessor(InternVLProcessorMixin, upstream.InternS1MultiModalProcessor):
    """Placeholders of K tokens."""

    def image_tokens(self, images: Any, index: int, kwargs: Mapping[str, object]) -> int:
        """Return how many visual tokens an image has; vLLM's own function overlooks a default of the processor."""
        processor, options = self._options(kwargs)
        size = images.get_image_size(index)
        tiles = processor.image_processor.get_number_of_image_patches(size.height, size.width, options)
        return int(tiles) * int(processor.image_seq_length)

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of tiles that an image is cut into."""
        processor, options = self._options({})
        images = processor.image_processor
        if not options["crop_to_patches"]:
            return 1, 1
        least, most = (options.get(name, getattr(images, name)) for name in ("min_patches", "max_patches"))
        canvas = images.size["height"], images.size["width"]
        columns, rows = get_optimal_tiled_canvas((height, width), canvas, least, most)
        return rows, columns

    def _options(self, kwargs: Mapping[str, object]) -> tuple[Any, Mapping[str, Any]]:
        """Return the processor of transformers, and its options for images with those of a request."""
        # The processor cuts images, whatever its image processor says. Its own function that counts tokens would
        # keep a request's options for all later requests.
        options = {"crop_to_patches": True, **self.image_options(kwargs)}
        return self.info.get_hf_processor(**kwargs), options


@MULTIMODAL_REGISTRY.register_processor(
    PrunedInternVLProcessor,
    info=upstream.InternS1ProcessingInfo,
    dummy_inputs=upstream.InternS1DummyInputsBuilder,
)
class PrunedInternVL(InternVLMixin, upstream.InternS1ForConditionalGeneration):
    """InternVL whose ``embed_multimodal`` returns K rows per image."""

    pixels = "pixel_values"
    video_pixels = "pixel_values_videos"

    def patches_per_side(self) -> int:
        """Return the patches of a tile along each axis."""
        config = self.config.vision_config
        return int(config.image_size[0]) // int(config.patch_size[0])

    def saliency_block(self) -> Any:
        """Return the tower's last layer."""
        return self.vision_tower.encoder.layer[-1]

    def saliency_layer(self) -> Any:
        """Return its attention."""
        return self.saliency_block().attention

    def projector(self) -> Any:
        """Return the module that gets ``(T, n, 4 * Dv)`` rows, a token's four patches side by side."""
        return self.multi_modal_projector

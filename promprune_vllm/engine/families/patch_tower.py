"""Shared code of the families whose tower takes an image of any size as a sequence of patches: Qwen-VL, GLM-V.

These towers have no CLS token. The saliency of a patch is the attention that it receives from all patches of its
image in the last block with full attention. The saliency of a visual token is the mean over its patches. The
language model has M-RoPE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from promprune_vllm.core import geometry
from promprune_vllm.core.budget import FIELD, KINDS, VIDEO
from promprune_vllm.core.features import Need, VisionFeatures
from promprune_vllm.core.positions import require_rows
from promprune_vllm.engine.api_server.all_media import Counted, order_of_ranges
from promprune_vllm.engine.api_server.processor import PrunedProcessorMixin
from promprune_vllm.engine.api_server.prompt_videos import VideoShape
from promprune_vllm.engine.api_server.pruning_plan import ImagePlan
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.engine.keys import SUMMARY
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.encoder_graphs import keep_eager
from promprune_vllm.engine.worker.encoder_sharding import Captured, share_images
from promprune_vllm.engine.worker.mrope import MRopePrunedMixin
from promprune_vllm.engine.worker.patch_merge import PatchMerge
from promprune_vllm.engine.worker.tower_hooks import attention_features, encoder_rows
from promprune_vllm.errors import BudgetError

_INPUTS = (("image_grid_thw", "pixel_values"), ("video_grid_thw", "pixel_values_videos"))


class PatchTowerProcessorMixin(PrunedProcessorMixin):
    """Placeholders of K tokens. A family implements ``image_tokens`` and ``token_grid``."""

    kinds = KINDS
    videos_are_runs: ClassVar[bool] = False
    """Whether a video is one run of tokens in the prompt, without text between its frames."""
    end_token: ClassVar[str]
    """The token that chat templates put after an image."""

    def token_grid(self, width: int, height: int, kwargs: Mapping[str, object]) -> tuple[int, int]:
        """Return the rows and columns of the grid of tokens of an image with this size in pixels."""
        raise NotImplementedError

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process one prompt; see ``BaseMultiModalProcessor.apply``."""
        result = super().apply(inputs, timing_ctx)
        if SUMMARY in result:
            with refusing(self.info.ctx.model_config):
                self._refuse_places(result, result[SUMMARY].images)
        return result

    def _refuse_places(self, prompt: Any, images: Sequence[ImagePlan]) -> None:
        """Raise ``BudgetError`` if the positions of a pruned image or video would not be known where it is."""
        ranges = {kind: places for kind, places in prompt["mm_placeholders"].items() if kind in self.kinds}
        spans = [ranges[kind][i].extract_embeds_range() for kind, i in order_of_ranges(ranges)]
        ends = [last + 1 for *_, (_, last) in spans]
        why = ""
        if images[-1].kept < images[-1].total and ends[-1] == len(prompt["prompt_token_ids"]):
            # The next position follows from the image's last row and column, which may have been dropped.
            why = "an image or video that ends the prompt: put text or the token {} after it"
        for end, ((start, _), *_), video in zip(ends, spans[1:], images[1:], strict=False):
            if self.videos_are_runs and video.kind == VIDEO and video.kept < video.total and start == end:
                # Where a run of a video starts is seen by the text before it.
                why = "a video right behind an image or a video: put text or the token {} between them"
        if why:
            raise BudgetError(
                f"{FIELD} cannot be applied to {why.format(self.end_token)}, as chat templates do.",
                reason="unsupported",
            )

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video, each of whose frames takes as many positions as an image."""
        frames, height, width = item["video_grid_thw"].data.tolist()
        side = math.isqrt(frames * height * width // total)
        return VideoShape(frames, total, frames * max(height, width) // side)

    def seen_frames(self, item: Any) -> SeenFrames:
        """Return the frames of a video as the tower gets them; of frames that it merges into one, the first."""
        videos = self.info.get_hf_processor().video_processor
        frames, height, width = item["video_grid_thw"].data.tolist()
        merge, side = videos.merge_size, videos.patch_size
        rows, columns = height // merge, width // merge
        patches = item["pixel_values_videos"].data  # (T * H * W, 3 * merged frames * side * side)
        cells = patches.view(frames, rows, columns, merge, merge, 3, -1, side, side)[..., 0, :, :]
        pixels = cells.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(frames, height * side, width * side, 3)
        return SeenFrames.of(pixels, (rows, columns), videos.image_mean, videos.image_std)

    def check_kept(self, media: Sequence[Counted], kwargs: Mapping[str, object]) -> None:
        """Refuse images and videos whose positions could exceed the model's rotary table."""
        if any(each.kept < each.total for each in media):
            taken = [(self._positions(each, kwargs), each.kept) for each in media]
            require_rows(taken, self.info.ctx.model_config.max_model_len)

    def _positions(self, media: Counted, kwargs: Mapping[str, object]) -> int:
        """Return how many positions an image or a video takes."""
        if media.size is None:
            return media.kept  # it keeps every token, and is placed as in vLLM
        if isinstance(media.size, VideoShape):
            return media.size.positions
        width, height = media.size
        return max(self.token_grid(width, height, kwargs))

    def boxes(self, width: int, height: int) -> list[geometry.Box | None]:
        """Return the pixel box of each visual token; vLLM resizes the image to a multiple of a token's size."""
        whole = (0.0, 0.0, float(width), float(height))
        return list(geometry.grid(*self.token_grid(width, height, {}), whole))


class PatchTowerMixin(MRopePrunedMixin):
    """Captures features of the tower; comes before vLLM's model class.

    A family implements ``projector`` and ``project``, and whatever else differs.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._merge = PatchMerge(self.visual.spatial_merge_size)
        if self._prunes:
            keep_eager((self.visual.blocks[self.saliency_block()], self.visual.merger))

    def saliency_block(self) -> int:
        """Return the index of the block whose attention gives the saliency."""
        return -1

    def projector(self) -> Any:
        """Return the first module after the tower's blocks that is never compiled: it gets the patches' rows."""
        raise NotImplementedError

    def patch_rows(self, inputs: Tensor) -> Tensor:
        """Return the ``(P, Dv)`` rows of patches that ``projector`` was called with."""
        return inputs.flatten(0, -2)

    def projected_width(self) -> int:
        """Return the width D of a visual token."""
        return int(self.visual.out_hidden_size)

    def in_raster_order(self, values: Tensor, grid: list[int]) -> Tensor:  # noqa: ARG002
        """Reorder ``(N, ...)`` values of an image from the tower's order of tokens to raster order."""
        return values

    def offsets_in_time(self, inputs: Mapping[str, Any], index: int, frames: int) -> Sequence[int]:  # noqa: ARG002
        """Return the offset in time of each frame of a video; see ``EncodedImage``."""
        return ()

    def grid_of(self, feature: Any) -> tuple[int, int, int] | None:
        """Return the grid of tokens of an image or video before pruning; ``None`` for what is never pruned."""
        if feature.modality not in KINDS:
            return None
        frames, height, width = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        return frames, height // self._merge.side, width // self._merge.side

    def capture(self, inputs: dict[str, Any], items: slice, needs: Need) -> list[EncodedImage]:
        """Encode some of the images or videos and return them with the requested features.

        Args:
            inputs: ``pixel_values`` or ``pixel_values_videos`` of ``(P, C)``, the patches of all B images or
                videos one after the other, and ``image_grid_thw`` or ``video_grid_thw`` ``(B, 3)``, the grid of
                patches of each.
            items: Which of the B images or videos.
            needs: Features to capture.
        """
        grid_name, pixels_name = next(names for names in _INPUTS if names[0] in inputs)
        grids = inputs[grid_name]
        counts = grids.prod(-1).tolist()  # patches per image or video
        start = sum(counts[: items.start])
        pixels = inputs[pixels_name][start : start + sum(counts[items])]
        rows, captured = self._encode({pixels_name: pixels, grid_name: grids[items]}, grids[items].tolist(), needs)
        return [
            replace(
                self._image(rows[i], grid, {name: values[i] for name, values in captured.items()}),
                offsets=self.offsets_in_time(inputs, items.start + i, grid[0]),
            )
            for i, grid in enumerate(grids[items].tolist())
        ]

    def _encode(
        self, inputs: dict[str, Tensor], grids: Sequence[list[int]], needs: Need
    ) -> tuple[Sequence[Tensor], Captured]:
        """Return the rows of each image or video, and the captured features of its patches."""
        counts = [math.prod(grid) for grid in grids]
        shares = share_images(counts, sharded=bool(getattr(self, "use_data_parallel", False)))
        own = [counts[i] for i in shares.own]
        # Patches attend within their frame.
        frames = [math.prod(grids[i][1:]) for i in shares.own for _ in range(grids[i][0])]
        layer = self.visual.blocks[self.saliency_block()].attn
        with (
            attention_features(layer, needs, counts=frames) as captured,
            encoder_rows(self.projector(), needs) as encoder,
        ):
            rows = self.embed_unpruned(**inputs)
        of_own = {
            name: values if len(values) == len(own) else [*torch.split(torch.cat(values), own)]
            for name, values in captured.items()
        }
        if encoder:
            of_own["encoder"] = [*torch.split(self.patch_rows(encoder[0]), own)]  # (P, Dv) each
        return rows, shares.exchange(of_own, next(iter(inputs.values())).device)

    def _image(self, rows: Tensor, grid: list[int], captured: Mapping[str, Tensor]) -> EncodedImage:
        frames, height, width = grid
        features = {}
        for name, patches in captured.items():
            merge = self._merge.side_by_side if name == "encoder" else self._merge.mean
            features[name] = self.in_raster_order(merge(patches, width), grid)
        side = self._merge.side
        projected = rows[:, : self.projected_width()]
        shape = (frames, height // side, width // side)
        return EncodedImage.of_frames(rows, VisionFeatures(projected=projected, grid=shape, **features))

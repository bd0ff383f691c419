"""Shared code of the Qwen-VL families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from promprune_vllm.engine.api_server.prompt_videos import VideoShape
from promprune_vllm.engine.families.patch_tower import PatchTowerMixin, PatchTowerProcessorMixin


class PrunedQwenProcessorMixin(PatchTowerProcessorMixin):
    """Placeholders of K tokens."""

    end_token = "<|vision_end|>"

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

    def token_grid(self, width: int, height: int, kwargs: Mapping[str, object]) -> tuple[int, int]:
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


class PrunedQwen2ProcessorMixin(PrunedQwenProcessorMixin):
    """The same for models whose videos are one run of tokens, with positions in time that follow seconds."""

    videos_are_runs = True

    def video_shape(self, item: Any, total: int) -> VideoShape:
        """Return the shape of a video."""
        shape = super().video_shape(item, total)
        config = self.info.get_hf_config().vision_config
        seconds = item["second_per_grid_ts"].data.item() if "second_per_grid_ts" in item else 1.0
        time = int((shape.frames - 1) * seconds * getattr(config, "tokens_per_second", 1.0)) + 1
        return shape._replace(positions=max(time, shape.positions // shape.frames))


class PrunedQwenMixin(PatchTowerMixin):
    """Captures features of a Qwen-VL tower; comes before vLLM's model class."""

    def projector(self) -> Any:
        """Return the module that gets the merger's input; the merger itself may be compiled and ignore hooks."""
        return self.visual.merger.ln_q

    def project(self, rows: Tensor) -> Tensor:
        """Project ``(K, 4 * Dv)`` rows, each with a token's four patches side by side, to ``(K, D)`` tokens."""
        projected: Tensor = self.visual.merger(rows.reshape(len(rows) * self._merge.side**2, -1))
        return projected


class PrunedQwen2Mixin(PrunedQwenMixin):
    """The same for models whose videos are one run of tokens, with positions in time that follow seconds."""

    videos_are_runs = True

    def offsets_in_time(self, inputs: Mapping[str, Any], index: int, frames: int) -> Sequence[int]:
        """Return how far in time each frame of a video is behind the first, as vLLM's positions have it."""
        if "video_grid_thw" not in inputs:
            return ()
        seconds = float(inputs["second_per_grid_ts"][index]) if "second_per_grid_ts" in inputs else 1.0
        factor = seconds * getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return [int(frame * factor) for frame in range(frames)]


class PrunedQwen3Mixin(PrunedQwenMixin):
    """The same for towers of Qwen3-VL's kind, whose rows also have the DeepStack rows of earlier blocks."""

    def projector(self) -> Any:
        """Return the module that gets the merger's input."""
        return self.visual.merger.norm

    def projected_width(self) -> int:
        """Return the width D of a visual token, without its DeepStack rows."""
        return self.visual_dim

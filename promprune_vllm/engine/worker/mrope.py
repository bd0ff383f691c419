"""True positions for pruned images in models with M-RoPE (time, height, width).

A kept token keeps the position it has in the unpruned prompt, and so does all text. Text positions follow from
sizes alone, so they are right before the encoder has run, also when a prefix cache spares us the image. Which
cells of its grid an image keeps is known only behind the encoder: each embedding carries its row and column in
four more channels, and vLLM's own hook for pruned videos takes them off again and writes the positions.

vLLM's functions behind that hook are not used: they restart the text after a portrait image at the wrong position,
write the positions of a second image over the first one's behind a long text, and store positions as numbers that
bfloat16 cannot hold beyond 256.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import MultiModalConfig, VllmConfig
from vllm.platforms import current_platform

from promprune_vllm.core.positions import table_rows
from promprune_vllm.engine import families, patches
from promprune_vllm.engine.compat import model_names, versions
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.worker import rotary_tables
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin

logger = logging.getLogger("vllm.promprune")
CHANNELS = 4
"""Of an embedding's position: row and column in the image's grid, each as two digits to the base of 256."""
_BASE = 256  # the largest one whose digits are exact in bfloat16
_UNMOVED = -1.0  # in every channel: the position is already right

versions.require_names(model_names.MROPE_NAMES)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why images cannot be pruned under these settings of the server, or ``None``."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "with --pipeline-parallel-size only the first stage would learn the positions of kept tokens"
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled() and not _is_ours(multimodal):
        return "with --video-pruning-rate vLLM's own pruning of videos already uses the way positions take"
    return None


@dataclass(frozen=True, slots=True)
class Span:
    """An image in a prompt.

    Args:
        offset: Its first token in the pruned prompt.
        kept: Tokens it has there.
        full: Tokens it has unpruned.
    """

    offset: int
    kept: int
    full: int


def unpruned_columns(length: int, spans: Sequence[Span]) -> Tensor:
    """Return where each token of a pruned prompt stands in the unpruned one.

    Args:
        length: Tokens of the pruned prompt.
        spans: Its images, by offset. Which of its tokens an image keeps is unknown: the first ones are named.

    Returns:
        ``(length,)`` int64, strictly increasing.
    """
    columns = torch.arange(length)
    for span in spans:
        columns[span.offset + span.kept :] += span.full - span.kept
    return columns


def encode_cells(rows: Tensor, cells: Tensor, width: int) -> Tensor:
    """Append to each embedding its row and column in the image's grid.

    Args:
        rows: ``(K, W)`` embeddings.
        cells: ``(K,)`` int64, indices of cells in raster order.
        width: Of the grid.

    Returns:
        ``(K, W + CHANNELS)``.
    """
    row, column = cells // width, cells % width
    digits = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], dim=1)
    return torch.cat([rows, digits.to(rows.dtype)], dim=1)


def decode_cells(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns ``(K,)`` int64 of ``(K, CHANNELS)`` digits; both are negative where none are."""
    d = digits.long()
    return d[:, 0] * _BASE + d[:, 1], d[:, 2] * _BASE + d[:, 3]


class MRopePrunedMixin(PrunedModelMixin):
    """Goes before vLLM's model class in the bases of a family with M-RoPE."""

    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self._prunes = families.unsupported_reason(vllm_config) is None
        if self._prunes:
            _keep_the_encoder_plain(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self._prunes:
            rotary_tables.lengthen(self, table_rows(vllm_config.model_config.max_model_len))
            # Only now: vLLM's model has read the flag as "video pruning", which stays off.
            _open_position_hook(vllm_config.model_config.multimodal_config)

    def with_positions(self, embeddings: Any) -> Any:
        """Append the channels to unpruned embeddings, images and videos: their positions are right as they are."""
        if not self._prunes or embeddings is None:
            return embeddings
        return [torch.cat([rows, rows.new_full((len(rows), CHANNELS), _UNMOVED)], dim=1) for rows in embeddings]

    def mark_kept(self, rows: Tensor, image: EncodedImage, positions: Tensor) -> Tensor:
        """Append the channels to the kept rows of one image."""
        (group,) = image.groups
        return encode_cells(rows, positions, group.features.grid[2])

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return the positions ``(3, L)`` of a prompt and what to add to an index to get a later one.

        Kept tokens of a pruned image all get the position of its first cell, until the encoder has run.
        """
        upstream = super().get_mrope_input_positions
        spans = [span for feature in mm_features if (span := self._span(feature)) is not None]
        if not spans:
            positions, delta = upstream(input_tokens, mm_features)
            return positions, delta
        spans.sort(key=lambda span: span.offset)
        columns = unpruned_columns(len(input_tokens), spans)
        tokens = _unpruned_tokens(input_tokens, spans)
        moved = [_moved(feature, columns, spans) for feature in mm_features]
        full, delta = upstream(tokens, moved)
        positions = full[:, columns]
        for span in spans:
            cells = slice(span.offset, span.offset + span.kept)
            positions[1:, cells] = positions[0, cells]  # an image is one step in time: all its cells share it
        return positions, delta + len(tokens) - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Take the channels off a chunk's embeddings and write the positions they tell.

        The embeddings belong, in order, to the image and video tokens from ``num_computed_tokens`` on. Writing
        twice changes nothing, so a preempted request may come again. vLLM calls this in every step, mostly with
        nothing: then it costs nothing.
        """
        if not self._prunes:
            upstream: tuple[Sequence[Tensor], Tensor, int] = super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return upstream
        bare, digits = self._split_channels(multimodal_embeddings)
        positions = mrope_positions
        if digits:
            positions = self._write(torch.cat(digits), input_ids, mrope_positions, num_computed_tokens)
        # Behind text, all three agree; behind an unpruned image or video, its last cell is the farthest.
        delta = int(positions[:, -1].max()) + 1 - positions.shape[1]
        return bare, positions, delta

    def _split_channels(self, embeddings: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        width = self.visual.out_hidden_size
        # Prompts sent as embeddings come this way too, as they are.
        digits = [rows[:, width:] for rows in embeddings if rows.shape[1] == width + CHANNELS]
        return [rows[:, :width] for rows in embeddings], digits

    def _write(self, digits: Tensor, input_ids: list[int] | Tensor, positions: Tensor, start: int) -> Tensor:
        ids = torch.as_tensor(input_ids[start:], device=positions.device)
        config = self.config
        media = (ids == config.image_token_id) | (ids == config.video_token_id)
        columns = media.nonzero().flatten()[: len(digits)] + start  # (R,)
        row, column = (cell.to(positions.device) for cell in decode_cells(digits))
        moved = columns[row >= 0]
        positions = positions.clone()
        # The position in time is that of the image's first cell: it was never touched.
        positions[1, moved] = positions[0, moved] + row[row >= 0]
        positions[2, moved] = positions[0, moved] + column[row >= 0]
        return positions

    def _span(self, feature: Any) -> Span | None:
        """Return the span of an image, or ``None`` for one that is not pruned and for anything else."""
        if feature.modality != "image":
            return None
        merge = self.visual.spatial_merge_size
        full = int(feature.data["image_grid_thw"].data.prod()) // merge**2
        place = feature.mm_position
        return Span(place.offset, place.length, full) if place.length < full else None


class _PruningMultiModalConfig(MultiModalConfig):
    """Tells vLLM's runners to call ``recompute_mrope_positions``; no pruning of videos is implied."""

    def is_multimodal_pruning_enabled(self) -> bool:
        return True


def _is_ours(config: Any) -> bool:
    return isinstance(config, _PruningMultiModalConfig)


def _open_position_hook(config: Any) -> None:
    # The object is this worker's own; its class decides what runners see, its values stay as they are.
    config.__class__ = _PruningMultiModalConfig
    if current_platform.is_cpu():
        patches.install(Stage.MROPE_CPU)


def add_pruning_flag(_: None) -> Any:
    """Return the flag of the runner for CPUs: the one for GPUs sets it when it loads a model."""
    return property(_prunes_positions, lambda _, __: None)


def _prunes_positions(runner: Any) -> bool:
    config = runner.model_config.multimodal_config
    return config is not None and bool(config.is_multimodal_pruning_enabled())


def _keep_the_encoder_plain(vllm_config: VllmConfig) -> None:
    compilation = vllm_config.compilation_config
    for option, harm in (
        ("cudagraph_mm_encoder", "a captured graph would run in place of the pruning"),
        ("compile_mm_encoder", "a compiled block would hide the attention that saliency is made of"),
    ):
        if getattr(compilation, option):
            logger.warning("PromPrune switches %s off: %s.", option, harm)
            setattr(compilation, option, False)


def _unpruned_tokens(tokens: list[int], spans: Sequence[Span]) -> list[int]:
    unpruned: list[int] = []
    done = 0
    for span in spans:
        unpruned += tokens[done : span.offset] + [tokens[span.offset]] * span.full
        done = span.offset + span.kept
    return unpruned + list(tokens[done:])


def _moved(feature: Any, columns: Tensor, spans: Sequence[Span]) -> Any:
    place = feature.mm_position
    full = {span.offset: span.full for span in spans}
    length = full.get(place.offset, place.length)
    return replace(feature, mm_position=replace(place, offset=int(columns[place.offset]), length=length))

"""Original positions for pruned images in models with M-RoPE (time, height, width).

Kept tokens and text have the same positions as in the unpruned prompt. Text positions follow from sizes alone, so
they are right before the encoder has run, and also if the prefix cache already has the image. Which cells of its
grid an image keeps is known only after the encoder: each embedding carries its row and column in extra channels.
If a video is one run of tokens, with the text between its frames or without, they also carry how far they are
behind its start. vLLM's hook for pruned videos, which we implement, removes the channels and writes the positions.

We do not use vLLM's own implementation of that hook: it restarts the text after a portrait image at a wrong
position, overwrites the first image's positions with the second's after a long text, and stores positions as
numbers that bfloat16 cannot represent beyond 256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from itertools import accumulate, takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import MultiModalConfig, VllmConfig
from vllm.platforms import current_platform

from promprune_vllm.core.budget import IMAGE, KINDS, VIDEO
from promprune_vllm.core.frames import split_over_frames
from promprune_vllm.core.positions import table_rows
from promprune_vllm.engine import families, patches
from promprune_vllm.engine.compat import parts, seams
from promprune_vllm.engine.compat.patching import Stage
from promprune_vllm.engine.keys import FRAME, LAYOUT, field_of
from promprune_vllm.engine.worker import rotary_tables
from promprune_vllm.engine.worker.cells import CHANNELS, UNCHANGED, encode_cells, starts_of_runs, write_cells
from promprune_vllm.engine.worker.encoded_image import EncodedImage
from promprune_vllm.engine.worker.pruned_model import PrunedModelMixin
from promprune_vllm.engine.worker.unpruned_prompt import Span, unpruned_columns, unpruned_feature, unpruned_tokens

seams.require(parts.MROPE)


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """Return why images cannot be pruned with the server's settings, or ``None``."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "with --pipeline-parallel-size, only the first stage would get the positions of kept tokens"
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None and multimodal.is_multimodal_pruning_enabled() and not _is_ours(multimodal):
        return "with --video-pruning-rate, vLLM's own pruning of videos already uses the hook for positions"
    return None


_ahead: ContextVar[int] = ContextVar("promprune_ahead", default=0)


def remember_lookahead(original: Any) -> Any:
    """Wrap how Model Runner V1 gathers embeddings: a drafter's begin one token after the step's.

    vLLM passes the model the step's own number of computed tokens with them: positions would be written one token
    too early.
    """

    def gather_mm_embeddings(self: Any, scheduler_output: Any, shift_computed_tokens: int = 0) -> Any:
        token = _ahead.set(shift_computed_tokens)
        try:
            return original(self, scheduler_output, shift_computed_tokens)
        finally:
            _ahead.reset(token)

    return gather_mm_embeddings


_delta: ContextVar[int | None] = ContextVar("promprune_delta", default=None)


def remember_delta(original: Any) -> Any:
    """Wrap how Model Runner V2 reads a request's positions, for the model to recompute: note its delta.

    V2 keeps the positions on the GPU. To read the delta from them, the host would wait for the whole encoder, in
    every step with an image. Recomputing never changes it: it follows from sizes, and vLLM has it on the CPU.

    Without that wait, the step before may still run when V2 stores all deltas for the second time in a step, in
    the buffer that it reads. Only slots of new requests have changed, and what it computes for these is dropped.
    """

    def read_prefill_positions(self: Any, req_idx: int, length: int) -> Any:
        _delta.set(int(self.prefill_delta.np[req_idx]))
        return original(self, req_idx, length)

    return read_prefill_positions


class MRopePrunedMixin(PrunedModelMixin):
    """Goes before vLLM's model class in the bases of a family with M-RoPE, which implements ``grid_of``."""

    supports_multimodal_pruning = True
    videos_are_runs: ClassVar[bool] = False
    """Whether a video is always one run of tokens, whose frames all start at one position in height and width."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self._prunes = families.unsupported_reason(vllm_config) is None
        self._sends = self._prunes and vllm_config.ec_transfer_config is not None
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if not self._prunes:
            # With --video-pruning-rate, runners would call a hook that not every class of vLLM's has.
            self.supports_multimodal_pruning = getattr(super(), "supports_multimodal_pruning", False)
        else:
            rotary_tables.lengthen(self, table_rows(vllm_config.model_config.max_model_len))
            # Not before super().__init__: vLLM's model reads the flag as "video pruning", which must stay off.
            _enable_position_hook(vllm_config.model_config.multimodal_config)

    def grid_of(self, feature: Any) -> tuple[int, int, int] | None:
        """Return the grid of tokens of a feature before pruning, frames, rows and columns.

        ``None`` for what is never pruned.
        """
        raise NotImplementedError

    def token_of(self, kind: str) -> int:
        """Return the token in whose place the embeddings of images or of videos are put."""
        return int(self.config.image_token_id if kind == IMAGE else self.config.video_token_id)

    def frame_start(self) -> int:
        """Return the token before the visual tokens of each frame of a video, if there is one."""
        return int(self.config.vision_start_token_id)

    def row_width(self) -> int:
        """Return the width of an unpruned image's or video's rows."""
        return int(self.visual.out_hidden_size)

    def mark_kept(self, rows: Tensor, image: EncodedImage, positions: Tensor) -> Tensor:
        """Append the channels to the kept rows of one image."""
        return encode_cells(rows, *image.cells(positions))

    def as_sent(self, embeddings: Any) -> Any:
        """Append the channels where an engine that shares its rows with others has left them out."""
        if not self._sends or embeddings is None:
            return embeddings
        width = self.row_width()
        return [
            rows if rows.shape[1] > width else torch.cat([rows, _unchanged(rows)], dim=1) for rows in embeddings
        ]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return the positions ``(3, L)`` of a prompt, and the offset from later tokens' indices to positions.

        Until the encoder has run, all kept tokens of a pruned run have the position of its first cell.
        """
        upstream = super().get_mrope_input_positions
        spans: list[Span] = []
        unpruned_features = []
        for feature in sorted(mm_features, key=lambda each: each.mm_position.offset):
            own = self._spans(feature, input_tokens)
            unpruned_features.append(unpruned_feature(feature, own, spans))
            spans += own
        if not spans:
            positions, delta = upstream(input_tokens, mm_features)
            return positions, delta
        columns = unpruned_columns(len(input_tokens), spans)
        tokens = unpruned_tokens(input_tokens, spans)
        unpruned_positions, delta = upstream(tokens, unpruned_features)
        positions = unpruned_positions[:, columns]
        for span in spans:
            cells = slice(span.offset, span.offset + span.kept)
            positions[1:, cells] = positions[1:, span.offset : span.offset + 1].clone()
        return positions, delta + len(tokens) - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Remove the channels from a chunk's embeddings, and write the positions that they encode.

        The embeddings belong, in order, to the image and video tokens from ``num_computed_tokens`` on. Writing
        twice changes nothing, so this works for preempted requests. vLLM calls this in every step, mostly without
        embeddings; then it costs nothing.
        """
        if not self._prunes:
            upstream: tuple[Sequence[Tensor], Tensor, int] = super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
            return upstream
        bare, digits = self._split_channels(multimodal_embeddings)
        positions = mrope_positions
        if digits is not None:
            start = num_computed_tokens + _ahead.get()
            positions = self._write(digits, input_ids, mrope_positions, start)
        delta = _delta.get()
        _delta.set(None)
        if delta is None:  # Model Runner V1, which keeps positions on the CPU
            # After text, all three agree. The last cell of an unpruned image or video has its highest position.
            delta = int(positions[:, -1].max()) + 1 - positions.shape[1]
        return bare, positions, delta

    def _split_channels(self, embeddings: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return the rows without channels, and ``(R, CHANNELS)`` digits if any image in the chunk is pruned."""
        width = self.row_width()
        if all(rows.shape[1] <= width for rows in embeddings):
            return embeddings, None
        digits = [
            rows[:, width:] if rows.shape[1] > width else _unchanged(rows)
            for rows in embeddings
            if getattr(rows, "modality", None) != "prompt_embeds"  # in the place of text tokens
        ]
        return [rows[:, :width] for rows in embeddings], torch.cat(digits)

    def _write(self, digits: Tensor, input_ids: list[int] | Tensor, positions: Tensor, start: int) -> Tensor:
        ids = torch.as_tensor(input_ids, device=positions.device)  # (L,)
        media = torch.stack([ids == self.token_of(kind) for kind in KINDS]).any(dim=0)
        # All tokens of an image or a frame have one position in time, which is right before anything is encoded.
        # That of a row with an offset is not: it is counted from where its video begins, behind a token of text.
        starts = starts_of_runs(positions[0], ids == self.token_of(VIDEO))
        # V2 has all of this on the GPU. V1 keeps positions on the CPU, so here it waits for the GPU's digits.
        ahead = positions[:, start:], starts[start:], media[start:]
        written = write_cells(*ahead, digits.to(positions.device), in_time_only=self.videos_are_runs)
        return torch.cat([positions[:, :start], written], dim=1)

    def _spans(self, feature: Any, tokens: Sequence[int]) -> list[Span]:
        """Return the run of a pruned image, or of each frame of a pruned video; none for anything else."""
        grid, placeholder = self.grid_of(feature), feature.mm_position
        if grid is None:
            return []
        if (layout := feature.data.get(field_of(VIDEO, LAYOUT))) is not None and layout.data.numel():
            return [self._span_with_text(placeholder, layout.data.tolist(), grid)]
        if placeholder.get_num_embeds() == math.prod(grid):
            return []
        frames, rows, columns = grid
        token, start, end = (
            self.token_of(feature.modality),
            placeholder.offset,
            placeholder.offset + placeholder.length,
        )
        if placeholder.is_embed is None:  # one run after the other
            counts = split_over_frames(placeholder.length, frames, rows * columns)
            starts = [start + before for before in accumulate(counts, initial=0)][:frames]
        else:
            starts = [i + 1 for i in range(start, end) if tokens[i] == self.frame_start()]
            counts = tuple(sum(1 for _ in takewhile(lambda n: tokens[n] == token, range(i, end))) for i in starts)
        return [Span(i, kept, rows * columns, token) for i, kept in zip(starts, counts, strict=True)]

    def _span_with_text(self, placeholder: Any, layout: Sequence[int], grid: tuple[int, int, int]) -> Span:
        """Return the one run of a pruned video that has the text between its frames in it; see ``keys.LAYOUT``."""
        token, size = self.token_of(VIDEO), math.prod(grid[1:])
        whole = [each for entry in layout for each in ([token] * size if entry == FRAME else [entry])]
        ((start, end),) = placeholder.extract_embeds_range()
        return Span(start, end + 1 - start, len(whole), token, whole)


def _unchanged(rows: Tensor) -> Tensor:
    """Return the channels ``(R, CHANNELS)`` of rows whose positions are right."""
    return rows.new_full((len(rows), CHANNELS), UNCHANGED)


class _PruningMultiModalConfig(MultiModalConfig):
    """Makes vLLM's runners call ``recompute_mrope_positions``, without pruning videos."""

    def is_multimodal_pruning_enabled(self) -> bool:
        return True


def _is_ours(config: Any) -> bool:
    return isinstance(config, _PruningMultiModalConfig)


def _enable_position_hook(config: Any) -> None:
    # The config belongs to this worker alone. Its new class changes the flag that runners read, and no value.
    config.__class__ = _PruningMultiModalConfig
    if current_platform.is_cpu():
        patches.install(Stage.MROPE_CPU)


def add_pruning_flag(_: None) -> Any:
    """Return the pruning flag as a property for the CPU runner. The GPU runner sets it when it loads a model."""
    return property(_prunes_positions, lambda _, __: None)


def _prunes_positions(runner: Any) -> bool:
    config, model = runner.model_config.multimodal_config, getattr(runner, "model", None)
    is_on = config is not None and bool(config.is_multimodal_pruning_enabled())
    return is_on and bool(getattr(model, "supports_multimodal_pruning", False))

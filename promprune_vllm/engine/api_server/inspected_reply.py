"""The reply of the inspector, made of what the engine did with an image or a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from promprune_vllm.core import geometry
from promprune_vllm.core.geometry import Box
from promprune_vllm.engine.api_server.inspector import Inspection
from promprune_vllm.engine.api_server.seen_frames import SeenFrames
from promprune_vllm.server.inspect_schemas import Frame, Group, InspectReply
from promprune_vllm.server.schemas import CacheBytes, Method


def reply(
    found: Inspection,
    boxes: Callable[[int, int], Sequence[Box | None]],
    methods: Sequence[Method],
    kv_cache: CacheBytes | None,
    *,
    pictures: bool,
) -> InspectReply:
    """Build the reply for one image or video.

    Args:
        found: What the engine did with it.
        boxes: Returns the pixel boxes of the tokens of an image of a width and height.
        methods: The allowed methods.
        kv_cache: Bytes of KV cache that it takes and saves.
        pictures: Whether frames have pictures.
    """
    trace = found.trace
    ((seen, kept),) = found.usage.images
    groups = [_group(part) for part in trace.get("parts", ())]
    visual = sorted(position for group in groups for position in group.kept) if groups else list(range(seen))
    positions = sorted([*visual, *trace.get("newlines", ())])
    (width, height), token_boxes, views = _places(found, boxes)
    covered = len(token_boxes) if found.frames is None else len(token_boxes) * len(views)
    newlines = 0 if found.frames is None else 1  # at most, behind the frames of LLaVA-OneVision
    if not 0 <= seen - covered <= newlines or len(positions) != kept:
        raise RuntimeError(f"{covered} boxes and {len(positions)} kept positions where {seen} and {kept} are told")
    method_by_name = {method.name: method for method in methods}
    return InspectReply(
        width=width,
        height=height,
        seen=seen,
        kept=kept,
        method=method_by_name[trace["method"]] if trace else None,
        boxes=[None if box is None else geometry.rounded(box) for box in token_boxes],
        views=views,
        frames=None if found.frames is None else _frames(found.frames, positions, pictures=pictures),
        indices=positions,
        groups=groups,
        selection_ms=round(1000 * trace["seconds"], 3) if trace else None,
        kv_cache=kv_cache,
        answer=found.answer,
    )


def _places(
    found: Inspection, boxes: Callable[[int, int], Sequence[Box | None]]
) -> tuple[tuple[int, int], Sequence[Box | None], list[int]]:
    """Return the size in pixels, the boxes of an image or a frame, and the first token of each view."""
    if found.frames is not None:
        frame = found.frames.boxes()
        return found.frames.size, frame, [n * len(frame) for n in range(len(found.frames.pixels))]
    (size,) = found.usage.sizes
    assert size is not None  # only image_embeds have no size
    cells = boxes(*size)
    views = [i for i, box in enumerate(cells) if i == 0 or (box is not None and box[:2] == (0.0, 0.0))]
    return size, cells, views


def _frames(frames: SeenFrames, positions: Sequence[int], *, pictures: bool) -> list[Frame]:
    each = frames.grid[0] * frames.grid[1]
    kept: list[list[int]] = [[] for _ in frames.pixels]
    for position in positions:
        if position < each * len(kept):  # else it is the newline behind them
            kept[position // each].append(position % each)
    shown = frames.pictures() if pictures else [None] * len(kept)
    return [Frame(kept=tokens, picture=picture) for tokens, picture in zip(kept, shown, strict=True)]


def _group(part: Mapping[str, Any]) -> Group:
    report = part["report"]
    entropy = next((value for name, value in report.items() if name.endswith("_entropy")), None)
    return Group(
        tokens=part["positions"],
        kept=part["kept"],
        salient=part["salient"],
        saliency=None if part["saliency"] is None else [float(f"{value:.6g}") for value in part["saliency"]],
        entropy=entropy,
        report=report,
    )

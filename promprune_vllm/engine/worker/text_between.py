"""The text between the frames of a video, where its rows enter the language model among those of the frames.

A method that compares frames decides how many tokens each one keeps, so it is not known before encoding where the
text stands. vLLM sees one run of K + S embeddings, and the worker puts the text's rows in their places. (vLLM does
the same for its own pruning in Qwen3-VL. It finds the text again from timestamps; ours comes with the video, so
every layout is one case.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from promprune_vllm.engine.keys import FRAME
from promprune_vllm.engine.worker.device_copies import copy_to_device
from promprune_vllm.engine.worker.encoded_image import EncodedImage, TextBetween


def with_text_between(
    video: EncodedImage, layout: Sequence[int], embed: Callable[[Tensor], Tensor]
) -> EncodedImage:
    """Return a video with the text between its frames.

    Args:
        video: With a group for each frame.
        layout: See ``keys.LAYOUT``.
        embed: Returns the language model's ``(S, D)`` embeddings of ``(S,)`` tokens.
    """
    frames = iter([group.features.grid for group in video.groups])
    visual: list[Tensor] = []
    places: list[int] = []
    offsets: list[int] = []
    frame_offsets: list[int] = []
    row = position = 0
    for entry in layout:
        if entry == FRAME:
            _, height, width = next(frames)
            visual.append(torch.arange(row, row + height * width))
            frame_offsets.append(position)
            row, position = row + height * width, position + max(height, width)  # as M-RoPE counts an image
        else:
            places.append(row)
            offsets.append(position)
            row, position = row + 1, position + 1
    if row != len(video.rows) + len(places):
        raise RuntimeError(f"the video has {len(video.groups)} frames, and its layout {len(frame_offsets)}")
    on_cpu = [torch.tensor([entry for entry in layout if entry != FRAME]), torch.tensor(places), torch.cat(visual)]
    tokens, at, of_visual, ahead = (
        copy_to_device(each, video.rows.device) for each in (*on_cpu, torch.tensor(offsets))
    )
    embedded = embed(tokens)
    rows = video.rows.new_zeros((len(places), video.rows.shape[1]))
    rows[:, : embedded.shape[1]] = embedded
    return replace(video, between=TextBetween(rows, at, of_visual, ahead, frame_offsets))

"""vLLM 0.33: positions of a second image are written over those of the first.

``recompute_mrope_positions`` (vllm/multimodal/video_prune/evs.py) looks for the next medium behind
``num_computed_tokens``, and counts only the tokens of media onto it: text between them is left out. Where the text
before the first image is longer than the image's kept tokens, the second image is taken for the first again. With
dense video this does not happen; with a few tokens of an image left it does. Nothing is dropped here, the images
are just small: the positions should come out as they went in.

    python mrope_two_images.py    # a CPU is enough; prints both and exits with 1 where they differ
"""

from __future__ import annotations

import sys

import torch
from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

TEXT, START, IMAGE, VIDEO = 0, 1, 2, 3
SIDE = 3  # an image has 3 x 3 tokens


def prompt(before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text, an image, two tokens of text, an image, text; and the positions ``(3, N)`` of a model."""
    ids: list[int] = []
    columns: list[torch.Tensor] = []
    position = 0
    for text in (before, 2):
        ids += [TEXT] * (text - 1) + [START] + [IMAGE] * SIDE**2
        columns.append(torch.arange(text).expand(3, -1) + position)
        position += text
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(SIDE), torch.arange(SIDE)).T
        columns.append(grid + position)
        position += SIDE
    columns.append(torch.arange(4).expand(3, -1) + position)
    return torch.tensor(ids + [TEXT] * 4), torch.cat(columns, dim=1)


def main() -> int:
    """Compare a short text before the images, where both agree, and a long one."""
    wrong = 0
    medium = compute_mrope_for_media(torch.tensor([1, SIDE, SIDE]), spatial_merge_size=1).T
    for before in (4, 20):
        ids, expected = prompt(before)
        found, _ = recompute_mrope_positions(ids, [medium, medium], expected, 0, START, IMAGE, VIDEO)
        equal = torch.equal(expected, found)
        wrong += not equal
        second = slice(-4 - SIDE**2, -4)
        print(f"{before} tokens of text before two images of {SIDE**2}: {'equal' if equal else 'DIFFERENT'}")
        print(f"  rows of the second image should be at {expected[1, second].tolist()}")
        print(f"  recompute_mrope_positions says        {found[1, second].tolist()}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

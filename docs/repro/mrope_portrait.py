"""vLLM 0.33: text behind a pruned portrait image gets positions inside the image.

``recompute_mrope_positions`` (vllm/multimodal/video_prune/evs.py) goes on behind a medium at
``base + width of its grid``. M-RoPE goes on at ``base + max(frames, height, width)``, as
``get_mrope_input_positions`` of the models does. The two differ wherever a grid is higher than wide. Nothing is
dropped here: the positions should come out as they went in.

    python mrope_portrait.py      # a CPU is enough; prints both and exits with 1 where they differ
"""

from __future__ import annotations

import sys

import torch
from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

TEXT, START, IMAGE, VIDEO = 0, 1, 2, 3


def positions_of_the_unpruned_prompt(before: int, height: int, width: int, after: int) -> torch.Tensor:
    """``(3, N)``: text counts up; the image has its grid; text goes on behind the largest position."""
    text = torch.arange(before).expand(3, -1)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).T + before
    rest = torch.arange(after).expand(3, -1) + before + max(height, width)
    return torch.cat([text, grid, rest], dim=1)


def recomputed(before: int, height: int, width: int, after: int) -> torch.Tensor:
    """The same prompt through vLLM's function, with every token of the image kept."""
    ids = torch.tensor([TEXT] * (before - 1) + [START] + [IMAGE] * (height * width) + [TEXT] * after)
    medium = compute_mrope_for_media(torch.tensor([1, height, width]), spatial_merge_size=1)
    before_pruning = positions_of_the_unpruned_prompt(before, height, width, after)
    found, _ = recompute_mrope_positions(ids, [medium.T], before_pruning, 0, START, IMAGE, VIDEO)
    return found


def main() -> int:
    """Compare a landscape, where both agree, and a portrait."""
    wrong = 0
    for height, width in ((4, 8), (8, 4)):
        expected = positions_of_the_unpruned_prompt(3, height, width, 4)
        found = recomputed(3, height, width, 4)
        equal = torch.equal(expected, found)
        wrong += not equal
        print(f"{height} x {width}: {'equal' if equal else 'DIFFERENT'}")
        print(f"  text behind the image should be at {expected[0, -4:].tolist()}")
        print(f"  recompute_mrope_positions says     {found[0, -4:].tolist()}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

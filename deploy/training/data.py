"""Training batches: scenes drawn by worker processes and used a few times each, with subsets of their patches."""

from __future__ import annotations

from dataclasses import fields
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deploy.training.samples import NAMES, Sample, pack, sample
from promprune_vllm.demo.scenes import Question, make_scene
from promprune_vllm.demo.scenes.record import GRID

PATCHES = GRID * GRID
CONCENTRATED_SHARE = 0.3
_POOL = 1536  # scenes kept for reuse, 0.5 GB
_AT_A_TIME = 8
_PAIR_QUESTIONS = 6  # per answer
_SAMPLERS = ((0.65, "things"), (0.20, "strata"), (0.15, "anywhere"))

Batch = dict[str, Tensor]


class TrainingScenes(Dataset[Batch]):
    """The scenes of a run by number, without end."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> Batch:
        concentrated = Random(f"mix/{self.seed}/{index}").random() < CONCENTRATED_SHARE
        kind = "concentrated" if concentrated else "scattered"
        return as_tensors(sample(make_scene(kind, self.seed * 10**9 + index, "train")))


def as_tensors(one: Sample) -> Batch:
    """Return a sample's arrays as tensors, by name."""
    return {field.name: torch.from_numpy(getattr(one, field.name)) for field in fields(Sample)}


class Pool:
    """The latest scenes of a run; a batch has some new ones and draws the others from the pool.

    The state is the number of the next scene and the state of the random generator; a resumed run redraws its
    scenes from the same seeds.
    """

    def __init__(self, seed: int, *, workers: int, following: int = 0, size: int = _POOL) -> None:
        self.following = max(0, following - size)
        self._rows: Batch = {}
        self._size = size
        self._waiting: list[Batch] = []
        indices = range(self.following, 10**9)
        # Not forked: a fork of a process with threads, such as one that has run an engine, may wait forever.
        context = "spawn" if workers else None
        self._loader: Any = iter(
            DataLoader(
                TrainingScenes(seed),
                batch_size=_AT_A_TIME,
                sampler=indices,
                num_workers=workers,
                multiprocessing_context=context,
            )
        )
        self.generator = torch.Generator().manual_seed(seed)
        self._take(following - self.following)

    def batch(self, size: int, *, uses: int) -> Batch:
        """Return `size` scenes, `1 / uses` of them new."""
        fresh = min(size, max(1, size // uses))
        self._take(fresh)
        held = min(self.following, self._size)
        newest = torch.arange(self.following - fresh, self.following) % self._size
        others = torch.randint(0, held, (size - fresh,), generator=self.generator)
        rows = torch.cat([newest, others])
        return {name: column[rows] for name, column in self._rows.items()}

    def _take(self, count: int) -> None:
        for _ in range(count):
            if not self._waiting:
                loaded = next(self._loader)
                self._waiting = [{name: column[i] for name, column in loaded.items()} for i in range(_AT_A_TIME)]
            for name, value in self._waiting.pop(0).items():
                if name not in self._rows:
                    self._rows[name] = torch.empty((self._size, *value.shape), dtype=value.dtype)
                self._rows[name][self.following % self._size] = value
            self.following += 1


def subset(held: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Select patches of each scene, in raster order, as if the image had been pruned.

    Args:
        held: ``(B, 576)`` bool, patches with a thing; the sampler "things" takes these first.
        keep: Number of patches to keep of the 576.
        generator: Random generator.

    Returns:
        ``(B, keep)`` int64, ascending in each row.
    """
    rows = len(held)
    if keep == PATCHES:
        return torch.arange(PATCHES).expand(rows, -1)
    how = torch.multinomial(torch.tensor([share for share, _ in _SAMPLERS]), rows, True, generator=generator)
    score = torch.rand(rows, PATCHES, generator=generator)
    score = score + (held & (how == 0)[:, None])
    kept = score.topk(keep, dim=1).indices.sort(dim=1).values
    edges = torch.arange(keep + 1) * PATCHES // keep
    strata = edges[:-1] + (torch.rand(rows, keep, generator=generator) * edges.diff()).long()
    return torch.where((how == 1)[:, None], strata, kept)


def pair_texts(named: Tensor, rng: Random) -> Tensor:
    """Return questions about pairs of scenes, which of them shows a thing: `(B, 55)` to `(B / 2, 6, T)`."""
    packed = []
    for first, second in named.view(-1, 2, len(NAMES)).bool():
        questions = []
        for answer, only in (("first", first & ~second), ("second", second & ~first)):
            names = [NAMES[i] for i in only.nonzero().flatten().tolist()]
            for name in rng.sample(names, min(_PAIR_QUESTIONS, len(names))):
                questions.append(Question("which-image", f"which image shows a {name}?", answer))
        rng.shuffle(questions)
        packed.append(pack(questions))
    return torch.from_numpy(np.stack(packed))

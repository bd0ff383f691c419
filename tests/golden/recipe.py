"""Makes the golden inputs: PCG64 uniforms and element-wise float32 arithmetic, nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
F32 = np.float32
Array = np.ndarray


class Draw:
    """One stream of random numbers, consumed in the recipe's order."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))

    def gauss(self, shape: tuple[int, ...]) -> Array:
        total = self.rng.random(shape, dtype=F32)
        for _ in range(3):
            total = total + self.rng.random(shape, dtype=F32)
        return (total - F32(2.0)) * F32(1.7320508)

    def attention(self, n: int) -> Array:
        u = self.rng.random(n, dtype=F32)
        return u * u * u * F32(0.01)

    def features(self, kind: str, n: int, d: int) -> Array:
        name = kind.rstrip("0123456789.")
        number = kind[len(name) :]
        return getattr(self, f"_{name}")(n, d, number)

    def _random(self, n: int, d: int, _: str) -> Array:
        return self.gauss((n, d))

    def _cluster(self, n: int, d: int, number: str) -> Array:
        centres = self.gauss((int(number), d))
        label = self.rng.integers(0, int(number), size=n)
        return centres[label] + F32(0.3) * self.gauss((n, d))

    def _lowrank(self, n: int, d: int, number: str) -> Array:
        x = np.zeros((n, d), dtype=F32)
        for _ in range(int(number)):
            a = self.gauss((n, 1))
            x += a * self.gauss((1, d))
        return x

    def _power(self, n: int, d: int, number: str) -> Array:
        return self.gauss((n, d)) * _column_scale(d, number)

    def _offset(self, n: int, d: int, number: str) -> Array:
        x = self._power(n, d, number)
        return x + F32(0.5) * self.gauss((1, d)) * _column_scale(d, number)

    def _dup(self, n: int, d: int, number: str) -> Array:
        base = self.gauss((int(number), d))
        return base[self.rng.integers(0, int(number), size=n)]

    def _constant(self, n: int, d: int, _: str) -> Array:
        return np.repeat(self.gauss((1, d)), n, axis=0)


@dataclass(frozen=True)
class Case:
    """One golden case: its description, its inputs and the stored outcome."""

    meta: dict[str, Any]
    x: Array = field(repr=False)
    attention: Array = field(repr=False)
    stored: dict[str, Array] = field(repr=False)


@dataclass(frozen=True)
class Tower:
    """Second stream of visionzip and prunesid: what the vision tower holds besides the patches ``x``."""

    hidden: Array = field(repr=False)  # (1 + n, d): CLS, then x
    attention: Array = field(repr=False)  # (16, n): CLS -> patch, per head
    keys: Array = field(repr=False)  # (1 + n, 64)

    @property
    def digests(self) -> dict[str, str]:
        """As the metas name them."""
        return {"hssha": digest(self.hidden), "attsha": digest(self.attention), "keysha": digest(self.keys)}


@dataclass(frozen=True)
class Clip:
    """Second stream of cdpruner: patches and text in CLIP's common space."""

    patches: Array = field(repr=False)  # (n, 768)
    text: Array = field(repr=False)  # (2, 768)

    @property
    def digests(self) -> dict[str, str]:
        """As the metas name them."""
        return {"xcsha": digest(self.patches), "tcsha": digest(self.text)}


def metas(name: str) -> list[dict[str, Any]]:
    with np.load(HERE / f"{name}.npz") as file:
        return json.loads(str(file["meta"]))


def case(name: str, meta: dict[str, Any]) -> Case:
    draw = Draw(meta["seed"])
    x = draw.features(meta["kind"], meta["n"], meta["d"])
    attention = draw.attention(meta["n"])
    prefix = f"c{meta['case']}_"
    with np.load(HERE / f"{name}.npz") as file:
        stored = {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}
    return Case(meta, x, attention, stored)


def tower(golden: Case) -> Tower:
    n, d = golden.x.shape
    draw = Draw(1000 + golden.meta["seed"])
    hidden = np.concatenate([draw.gauss((1, d)), golden.x])
    attention = np.stack([draw.attention(n) for _ in range(16)])
    return Tower(hidden, attention, draw.gauss((n + 1, 64)))


def clip(golden: Case) -> Clip:
    n, _ = golden.x.shape
    draw = Draw(2000 + golden.meta["seed"])
    return Clip(draw.gauss((n, 768)), draw.gauss((2, 768)))


def comparable(golden: Case) -> bool:
    """Whether this numpy drew the very inputs the stored outcome came from (prunesid stores no digests)."""
    drawn = {"xsha": digest(golden.x), "asha": digest(golden.attention)}
    if {"hssha", "attsha", "keysha"} & golden.meta.keys():
        drawn |= tower(golden).digests
    if {"xcsha", "tcsha"} & golden.meta.keys():
        drawn |= clip(golden).digests
    return all(golden.meta[key] == value for key, value in drawn.items() if key in golden.meta)


def digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _column_scale(d: int, number: str) -> Array:
    s = F32(1.0) / np.arange(1, d + 1, dtype=F32)
    return {"1.0": s, "0.5": np.sqrt(s), "0.75": np.sqrt(s * np.sqrt(s)), "1.5": s * np.sqrt(s)}[number]

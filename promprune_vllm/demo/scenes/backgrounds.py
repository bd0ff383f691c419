"""Backgrounds of scenes: flat colors, gradients, several kinds of textures, crops of photographs."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageOps

from promprune_vllm.demo.scenes.assets import photo, photo_names
from promprune_vllm.demo.scenes.record import PIXELS

# Relative frequency of each background. Concentrated scenes only use the last two, where each patch differs from
# its neighbors, so that a selection for diversity alone spends its tokens on the background.
BACKGROUNDS = ("plain", "gradient", "texture", "photo")
SCATTERED_WEIGHTS = (0.15, 0.15, 0.35, 0.35)
CONCENTRATED_WEIGHTS = (0.0, 0.0, 0.5, 0.5)
_MAX_SATURATION = 0.35  # things are more saturated than backgrounds
_SMOOTH = Image.Resampling.BICUBIC


def background(name: str, rng: np.random.Generator, split: str) -> Image.Image:
    """Draw one of `BACKGROUNDS`, RGB, `PIXELS` per side."""
    if name == "photo":
        return _photo(rng, split)
    first, second = _dull(rng), _dull(rng)
    if name == "plain":
        return Image.new("RGB", (PIXELS, PIXELS), first)
    level = _gradient(rng) if name == "gradient" else _TEXTURES[rng.integers(len(_TEXTURES))](rng)
    return ImageOps.colorize(level, first, second)


def _dull(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, _MAX_SATURATION), rng.uniform(0.1, 0.85))
    return int(255 * red), int(255 * green), int(255 * blue)


def _gradient(rng: np.random.Generator) -> Image.Image:
    angle = rng.uniform(0, 2 * np.pi)
    along = np.linspace(-90, 90, PIXELS, dtype=np.float32)
    level = 127.5 + np.float32(np.sin(angle)) * along[:, None] + np.float32(np.cos(angle)) * along[None, :]
    return Image.fromarray(level.astype(np.uint8))


def _noise(rng: np.random.Generator, cells: int, filtered: Image.Resampling = _SMOOTH) -> Image.Image:
    """Return gray noise with `cells` bumps per side, `PIXELS` per side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return coarse.resize((PIXELS, PIXELS), filtered)


def _clouds(rng: np.random.Generator) -> Image.Image:
    return Image.blend(Image.blend(_noise(rng, 5), _noise(rng, 17), 0.4), _noise(rng, 60), 0.2)


def _marble(rng: np.random.Generator) -> Image.Image:
    waves = rng.uniform(20, 60) / 255
    return _noise(rng, 7).point([int(127.5 + 127.5 * np.sin(waves * value)) for value in range(256)])


def _stripes(rng: np.random.Generator) -> Image.Image:
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 40)
    along = np.arange(PIXELS, dtype=np.float32) * np.float32(2 * np.pi / period)
    across, down = along[None, :] * np.float32(np.cos(angle)), along[:, None] * np.float32(np.sin(angle))
    wave = np.sin(across) * np.cos(down) + np.cos(across) * np.sin(down)  # the sine of the sum, cheaply
    return Image.blend(Image.fromarray((127 + 120 * wave).astype(np.uint8)), _noise(rng, 30), 0.5)


def _grain(rng: np.random.Generator) -> Image.Image:
    return Image.blend(_noise(rng, int(rng.integers(60, 160))), _noise(rng, 6), 0.4)


def _patchwork(rng: np.random.Generator) -> Image.Image:
    cells = _noise(rng, int(rng.integers(8, 30)), Image.Resampling.NEAREST)
    return Image.blend(cells, _noise(rng, 80), 0.2)


_TEXTURES = (_clouds, _marble, _stripes, _grain, _patchwork)


def _photo(rng: np.random.Generator, split: str) -> Image.Image:
    """Return a random square crop of a photograph, paler and darker than the original."""
    names = photo_names(split)
    whole = photo(split, names[rng.integers(len(names))])
    side = min(whole.size) * rng.uniform(0.5, 1.0)
    left, top = rng.uniform(0, whole.width - side), rng.uniform(0, whole.height - side)
    box = (left, top, left + side, top + side)
    piece = whole.resize((PIXELS, PIXELS), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    grey = piece.convert("L").convert("RGB")
    piece = Image.blend(grey, piece, rng.uniform(0.2, 0.6))
    tone = Image.new("RGB", piece.size, (int(rng.uniform(20, 200)),) * 3)
    return Image.blend(tone, piece, rng.uniform(0.6, 0.95))

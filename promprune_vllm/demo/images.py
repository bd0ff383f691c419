"""Images for measurements: the demo's photographs, crops of them, and synthetic images from plain to busy."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from promprune_vllm.demo import PHOTOS, photo_path


def photo(name: str) -> Image.Image:
    """Return a photograph of the demo."""
    return Image.open(photo_path(name)).convert("RGB")


def photographs() -> dict[str, Image.Image]:
    """Return the photographs and the four quarters of each: some are all sky, some all texture."""
    images = {}
    for name in sorted(PHOTOS):
        whole = images[name] = photo(name)
        width, height = (side // 2 for side in whole.size)
        for i in range(4):
            left, top = i % 2 * width, i // 2 * height
            images[f"{name}, quarter {i + 1}"] = whole.crop((left, top, left + width, top + height))
    return images


def synthetic() -> dict[str, Image.Image]:
    """Return synthetic images: plain ones, noisy ones, and document pages."""
    return {
        "flat": Image.new("RGB", (1024, 1024), (90, 120, 200)),
        "gradient": Image.linear_gradient("L").convert("RGB"),
        "grain": noise(4),
        "noise": noise(80),
        "page": page(60, 90),
        "note": page(12, 40),
        "slide": slide(),
    }


def noise(spread: float) -> Image.Image:
    """Return gray with Gaussian noise of this standard deviation per pixel; a camera's is about 4."""
    gray = np.random.default_rng(0).normal(120, spread, (1024, 1024, 1)).clip(0, 255)
    return Image.fromarray(gray.astype(np.uint8).repeat(3, axis=2))


def page(lines: int, columns: int) -> Image.Image:
    """Return a white page with small text."""
    image = Image.new("RGB", (850, 1100), "white")
    pen, letters = ImageDraw.Draw(image), random.Random(1)
    for i in range(lines):
        words = "".join(letters.choice("abcdefghij klmnop qrstu vwxyz") for _ in range(columns))
        pen.text((60, 50 + 17 * i), words, fill="black")
    return image


def slide() -> Image.Image:
    """Return a slide with a few large words."""
    image = Image.new("RGB", (1280, 720), "white")
    for i, line in enumerate(("Quarterly results", "Revenue up", "Costs down")):
        ImageDraw.Draw(image).text((100, 80 + 120 * i), line, fill="black", font=ImageFont.load_default(48))
    return image

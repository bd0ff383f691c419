"""Draws what is kept of an image: kept tokens lit, dropped ones dark, each stage in a colour of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's blue and orange: told apart by colour-blind eyes too, and light enough on the dark.
SALIENT, COVERING = (0, 114, 178), (230, 159, 0)
_DARK, _PAPER, _INK = 0.25, (255, 255, 255), (20, 20, 20)
_MIN_CELL_PX = 14
_GAP = 8
_LETTER_PX = 15


def overlay(image: Image.Image, told: Mapping[str, Any]) -> Image.Image:
    """Draw one image with its tokens, its views side by side where the model has several.

    Args:
        image: As it was sent; as large as the reply says.
        told: The reply of ``POST /v1/visual_tokens/inspect``.

    Raises:
        ValueError: The reply is about an image of another size.
    """
    if image.size != (told["width"], told["height"]):
        raise ValueError(
            f"the reply is about an image of {told['width']} x {told['height']} pixels, not {image.size}"
        )
    ends = [*told["views"][1:], told["seen"]]
    fates = colours(told)
    return beside([_view(image, told["boxes"], fates, span) for span in zip(told["views"], ends, strict=True)])


def colours(told: Mapping[str, Any]) -> dict[int, tuple[int, int, int]]:
    """Return the colour of each kept token: salient, or covering and everything else."""
    salient = {token for group in told["groups"] for token in group["salient"] or ()}
    return {token: SALIENT if token in salient else COVERING for token in told["indices"]}


def caption(told: Mapping[str, Any]) -> str:
    """Say in one line what an overlay shows."""
    if told["method"] is None:
        return f"all {told['seen']} tokens"
    text = f"{told['method']['name']}: {told['kept']} of {told['seen']}"
    stages = [group["salient"] for group in told["groups"] if group["salient"] is not None]
    if stages:
        salient = sum(map(len, stages))
        text += f", {salient} salient"
    entropies = [group["entropy"] for group in told["groups"] if group["entropy"] is not None]
    return text + (f", H {sum(entropies) / len(entropies):.2f}" if entropies else "")


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Put a line of text above a picture."""
    font = ImageFont.load_default(_LETTER_PX)
    high = _LETTER_PX + 8
    made = Image.new("RGB", (picture.width, picture.height + high), _PAPER)
    pen = ImageDraw.Draw(made)
    while title and pen.textlength(title, font) > picture.width - 4:
        title = title[:-2].rstrip(" ,:…") + "…" if len(title) > 2 else ""
    pen.text((2, 3), title, _INK, font)
    made.paste(picture, (0, high))
    return made


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures next to each other."""
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    made = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        made.paste(picture, (left, 0))
        left += picture.width + _GAP
    return made


def sheet(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Lay out pictures in rows of at most so many; each given row begins a new one."""
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    width = max(sum(p.width for p in line) + _GAP * (len(line) - 1) for line in lines)
    made = Image.new("RGB", (width, sum(max(p.height for p in line) + _GAP for line in lines) - _GAP), _PAPER)
    top = 0
    for line in lines:
        made.paste(beside(line), (0, top))
        top += max(p.height for p in line) + _GAP
    return made


def _view(
    image: Image.Image,
    boxes: Sequence[Sequence[float] | None],
    fates: Mapping[int, tuple[int, int, int]],
    span: tuple[int, int],
) -> Image.Image:
    cells = {i: box for i in range(*span) if (box := boxes[i]) is not None}
    smallest = min(min(right - left, bottom - top) for left, top, right, bottom in cells.values())
    scale = max(1.0, _MIN_CELL_PX / max(smallest, 1.0))
    large = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    made = Image.blend(Image.new("RGB", large.size), large, _DARK)
    pen = ImageDraw.Draw(made)
    for token, colour in fates.items():
        if token in cells:
            left, top, right, bottom = (round(edge * scale) for edge in cells[token])
            made.paste(large.crop((left, top, right, bottom)), (left, top))
            pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=2)
    return made

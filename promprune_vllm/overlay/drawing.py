"""Draws which tokens are kept: kept tokens bright, dropped ones dark, one outline color per stage."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's blue and orange: safe for color-blind readers, and bright enough on dark.
SALIENT, COVERING = (0, 114, 178), (230, 159, 0)
_DARK, _PAPER, _INK = 0.25, (255, 255, 255), (20, 20, 20)
_MIN_CELL_PX = 14
_GAP = 8
_LETTER_PX = 15
_FRAMES_PER_LINE = 8


def overlay(image: Image.Image, reply: Mapping[str, Any]) -> Image.Image:
    """Draw one image with its tokens; if the model has several views of it, side by side.

    Args:
        image: The image that was sent, at the same size.
        reply: The reply of ``POST /v1/visual_tokens/inspect``.

    Raises:
        ValueError: The reply is about an image of another size.
    """
    if image.size != (reply["width"], reply["height"]):
        raise ValueError(
            f"the reply is about an image of {reply['width']} x {reply['height']} pixels, not {image.size}"
        )
    ends = [*reply["views"][1:], reply["seen"]]
    outlines = outline_colors(reply)
    return beside(
        [_view(image, reply["boxes"], outlines, span) for span in zip(reply["views"], ends, strict=True)]
    )


def contact_sheet(reply: Mapping[str, Any]) -> Image.Image:
    """Draw the frames of a video with their tokens, each below its number and what it keeps.

    Args:
        reply: The reply of ``POST /v1/visual_tokens/inspect``, with pictures.
    """
    each, outlines = len(reply["boxes"]), outline_colors(reply)
    drawn = []
    for number, frame in enumerate(reply["frames"]):
        with Image.open(io.BytesIO(base64.b64decode(frame["picture"].partition(",")[2]))) as file:
            picture = file.convert("RGB")
        scale = picture.width / reply["width"], picture.height / reply["height"]
        boxes = [
            (left * scale[0], top * scale[1], right * scale[0], bottom * scale[1])
            for left, top, right, bottom in reply["boxes"]
        ]
        own = {token: outlines[number * each + token] for token in frame["kept"]}
        title = f"{number + 1}: {len(frame['kept'])} of {each}"
        drawn.append(titled(_view(picture, boxes, own, (0, each)), title))
    return sheet([drawn], min(len(drawn), _FRAMES_PER_LINE))


def outline_colors(reply: Mapping[str, Any]) -> dict[int, tuple[int, int, int]]:
    """Return the outline color of each kept token: salient, or covering (also if there are no stages)."""
    salient = {token for group in reply["groups"] for token in group["salient"] or ()}
    return {token: SALIENT if token in salient else COVERING for token in reply["indices"]}


def caption(reply: Mapping[str, Any]) -> str:
    """Return a one-line caption for an overlay: what is kept, and the answer if a question was asked."""
    return _kept(reply) + _answered(reply.get("answer"))


def _kept(reply: Mapping[str, Any]) -> str:
    if reply["method"] is None:
        return f"all {reply['seen']} tokens"
    text = f"{reply['method']['name']}: {reply['kept']} of {reply['seen']}"
    stages = [group["salient"] for group in reply["groups"] if group["salient"] is not None]
    if stages:
        salient = sum(map(len, stages))
        text += f", {salient} salient"
    entropies = [group["entropy"] for group in reply["groups"] if group["entropy"] is not None]
    return text + (f", H {sum(entropies) / len(entropies):.2f}" if entropies else "")


def _answered(answer: Mapping[str, Any] | None) -> str:
    """Return the answer with the kept tokens, its confidence, and the answer that leaves if it is another."""
    if answer is None:
        return ""
    first = answer["first"] or answer
    text = f', "{first["text"].strip()}"'
    text += "" if first["confidence"] is None else f" ({first['confidence']:.2f})"
    return text + (f', then "{answer["text"].strip()}"' if answer["first"] else "")


def titled(picture: Image.Image, title: str) -> Image.Image:
    """Put a line of text above a picture."""
    font = ImageFont.load_default(_LETTER_PX)
    high = _LETTER_PX + 8
    canvas = Image.new("RGB", (picture.width, picture.height + high), _PAPER)
    pen = ImageDraw.Draw(canvas)
    while title and pen.textlength(title, font) > picture.width - 4:
        title = title[:-2].rstrip(" ,:…") + "…" if len(title) > 2 else ""
    pen.text((2, 3), title, _INK, font)
    canvas.paste(picture, (0, high))
    return canvas


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures next to each other."""
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), _PAPER)
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + _GAP
    return canvas


def sheet(rows: Sequence[Sequence[Image.Image]], columns: int) -> Image.Image:
    """Arrange pictures in lines of at most ``columns``; each given row starts a new line."""
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    width = max(sum(p.width for p in line) + _GAP * (len(line) - 1) for line in lines)
    canvas = Image.new("RGB", (width, sum(max(p.height for p in line) + _GAP for line in lines) - _GAP), _PAPER)
    top = 0
    for line in lines:
        canvas.paste(beside(line), (0, top))
        top += max(p.height for p in line) + _GAP
    return canvas


def _view(
    image: Image.Image,
    boxes: Sequence[Sequence[float] | None],
    outlines: Mapping[int, tuple[int, int, int]],
    span: tuple[int, int],
) -> Image.Image:
    cells = {i: box for i in range(*span) if (box := boxes[i]) is not None}
    smallest = min(min(right - left, bottom - top) for left, top, right, bottom in cells.values())
    scale = max(1.0, _MIN_CELL_PX / max(smallest, 1.0))
    large = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
    canvas = Image.blend(Image.new("RGB", large.size), large, _DARK)
    pen = ImageDraw.Draw(canvas)
    for token, color in outlines.items():
        if token in cells:
            left, top, right, bottom = (round(edge * scale) for edge in cells[token])
            canvas.paste(large.crop((left, top, right, bottom)), (left, top))
            pen.rectangle((left, top, right - 1, bottom - 1), outline=color, width=2)
    return canvas

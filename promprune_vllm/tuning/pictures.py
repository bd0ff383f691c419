"""Questions whose answers changed, for a person to look at: their images beside the tokens that were kept."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console

from promprune_vllm.errors import InspectError
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.target import Target
from promprune_vllm.overlay.client import InspectClient
from promprune_vllm.overlay.drawing import overlay
from promprune_vllm.tuning.questions import Question, opened
from promprune_vllm.tuning.records import Audit, Said
from promprune_vllm.tuning.summary import Cell, Summary

MOST = 24
"""Questions that are shown."""
MOST_IMAGES = 4
"""Images of one question that are shown."""
_SIDE_PX = 420
_QUALITY = 80


@dataclass(frozen=True, slots=True)
class Example:
    """A question whose first answer changed.

    Args:
        question: The question.
        full: The answer with all tokens.
        said: The answer with fewer.
        audit: What all tokens say about it, if it was audited.
        again: Whether it is asked for again, so that a client gets the answer with all tokens after all.
    """

    question: Question
    full: Said
    said: Said
    audit: Audit | None
    again: bool


def changed(summary: Summary, questions: Sequence[Question]) -> list[Example]:
    """Return all questions whose answers changed at the recommended budget, those that stay changed first.

    Among them, those that lost most per token come first.
    """
    cell = summary.level
    return [] if cell is None else sorted(_changed(summary, cell, questions), key=_order)


def examples(summary: Summary, questions: Sequence[Question]) -> list[Example]:
    """Return the questions of ``changed`` that are shown."""
    return changed(summary, questions)[:MOST]


def _changed(summary: Summary, cell: Cell, questions: Sequence[Question]) -> Iterable[Example]:
    said, audits = summary.records.said, summary.records.audits
    for question in questions:
        key = (question.id, cell.method, cell.budget)
        full, fewer = said.get((question.id, FULL_METHOD, FULL_METHOD)), said.get(key)
        if full is not None and fewer is not None and not fewer.same_as(full):
            yield Example(question, full, fewer, audits.get(key), fewer.confidence < cell.threshold)


def _order(example: Example) -> tuple[bool, float]:
    audit = example.audit
    return example.again, -(audit.nats / audit.tokens) if audit is not None and audit.tokens else 0.0


def draw(target: Target, shown: Sequence[Example], folder: Path, err: Console) -> str | None:
    """Draw the kept tokens of each shown image that has no drawing in the folder yet.

    Args:
        target: Server to ask: its inspector tells which tokens are kept.
        shown: Questions to draw for.
        folder: Folder of the drawings.
        err: Console that shows what is going on.

    Returns:
        Why there are none, if the server does not tell.
    """
    todo = [
        (example, path, file)
        for example in shown
        for path, digest in _images(example.question)
        if not (file := folder / _name(example, digest)).is_file()
    ]
    if not todo:
        return None
    err.print(f"Drawing the kept tokens of {len(todo)} images …", highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    with InspectClient(target.url, target.api_key) as server:
        for example, path, file in todo:
            said, text = example.said, example.question.text
            try:
                told = server.inspect(path, _sent(said.budget), said.method, text, answer=False)
                file.write_bytes(_jpeg(overlay(opened(path), told)))
            except (InspectError, ValueError) as error:
                return f"The kept tokens of images are not drawn: {error}"
    return None


def shown_images(example: Example, folder: Path) -> list[tuple[str, str | None]]:
    """Return each image of a question and the drawing of its kept tokens, if there is one, as data URLs."""
    found = []
    for path, digest in _images(example.question):
        file = folder / _name(example, digest)
        found.append((_url(_jpeg(opened(path))), _url(file.read_bytes()) if file.is_file() else None))
    return found


def _images(question: Question) -> list[tuple[Path, str]]:
    return list(zip(question.images, question.digests, strict=True))[:MOST_IMAGES]


def _name(example: Example, digest: str) -> str:
    told = repr((digest, example.said.method, example.said.budget, example.question.text))
    return hashlib.sha256(told.encode()).hexdigest()[:24] + ".jpg"


def _sent(budget: str) -> int | float | str:
    """Return a stored budget as it was sent."""
    try:
        return int(budget)
    except ValueError:
        try:
            return float(budget)
        except ValueError:
            return budget


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    image.convert("RGB").save(content, format="JPEG", quality=_QUALITY)
    return content.getvalue()


def _url(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"

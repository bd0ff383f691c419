"""Reads an operator's questions: one JSON object per line, with images, a question and maybe the right answer."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps

from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.target import tls_context

_FIELDS = {"image", "question", "answer", "id"}
_FETCH_SECONDS = 60
_LISTED = 20  # faulty lines in one error
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        id: Its name; the number of its line by default.
        images: Files of its images, in order.
        sizes: Width and height of each in pixels, as a server sees them.
        digests: Hash of each image's content.
        text: What is asked.
        answer: The right answer, if it is known.
        cluster: Questions that share an image, directly or through others, have the same number.
    """

    id: str
    images: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]
    digests: tuple[str, ...]
    text: str
    answer: str | None
    cluster: int = 0


class _Bad(Exception):
    """What is wrong with one line."""


def load(file: Path, store: Path) -> tuple[Question, ...]:
    """Read and check a file of questions; nothing is asked yet.

    Args:
        file: JSON lines. ``image`` is a path relative to the file, an absolute path, an http(s) or data URL, or a
            list of these.
        store: Folder for images that are not files: fetched once, and kept for a resumed run.

    Raises:
        EvaluationError: The file cannot be read, is empty, or has faulty lines; names each with its number.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file} cannot be read ({error}): give a file of questions.") from error
    found: list[Question] = []
    bad: list[str] = []
    number_by_id: dict[str, int] = {}
    picture = _once(lambda source: _picture(source, file.parent, store))  # many lines share an image
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(line, number, picture)
            if (earlier := number_by_id.setdefault(question.id, number)) != number:
                raise _Bad(f"id {question.id!r} is that of line {earlier} too")
            found.append(question)
        except _Bad as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        listed = "".join(f"\n  {each}" for each in bad[:_LISTED])
        raise EvaluationError(f"{file} has {len(bad)} faulty lines; nothing was asked.{listed}{more}")
    if not found:
        raise EvaluationError(f'{file} has no questions: write lines such as {{"image": …, "question": …}}.')
    return _clustered(found)


def fingerprint(questions: Sequence[Question]) -> str:
    """Return a hash of all that is asked, to detect answers to other questions."""
    told = [(each.id, each.digests, each.text, each.answer) for each in questions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def opened(path: Path) -> Image.Image:
    """Return an image as servers see it: in RGB, turned as its EXIF data say."""
    with Image.open(path) as file:
        turned: Image.Image = ImageOps.exif_transpose(file)
        return turned.convert("RGB")


_Picture = tuple[Path, tuple[int, int], str]


def _once(read: Callable[[str], _Picture]) -> Callable[[str], _Picture]:
    """Read each image once, also if that fails: an address that does not answer may take a minute."""

    @functools.cache
    def found(source: str) -> _Picture | _Bad:
        try:
            return read(source)
        except _Bad as error:
            return error

    def picture(source: str) -> _Picture:
        if isinstance(told := found(source), _Bad):
            raise _Bad(*told.args)
        return told

    return picture


def _question(line: str, number: int, picture: Callable[[str], _Picture]) -> Question:
    try:
        told = json.loads(line)
    except ValueError as error:
        raise _Bad(f"is not JSON ({error})") from error
    if not isinstance(told, dict):
        raise _Bad("is not an object")
    if unknown := sorted(set(told) - _FIELDS):
        raise _Bad(f"has {', '.join(map(repr, unknown))}; fields are {', '.join(sorted(_FIELDS))}")
    text, name = _text(told, "question"), told.get("id", number)
    answer = None if told.get("answer") is None else _text(told, "answer")
    if isinstance(name, bool) or not isinstance(name, int | str) or name == "":
        raise _Bad(f"id must be text or a number, got {name!r}")
    images = told.get("image")
    sources: list[Any] = images if isinstance(images, list) else [images]
    if not sources or not all(isinstance(each, str) and each for each in sources):
        raise _Bad(f"image must be a path, a URL or a list of these, got {images!r}")
    pictures = [picture(source) for source in sources]
    paths, sizes, digests = zip(*pictures, strict=True)
    return Question(str(name), paths, sizes, digests, text, answer)


def _text(told: dict[str, Any], name: str) -> str:
    value = told.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _Bad(f"{name} must be text, got {json.dumps(value)}")
    return value


def _picture(source: str, folder: Path, store: Path) -> _Picture:
    shown = source if len(source) <= _SHOWN_CHARACTERS else f"{source[:_SHOWN_CHARACTERS]}…"
    try:
        if source[:5].lower() == "data:":
            path = _stored(store, source, lambda: _decoded(source))
        elif source.lower().startswith(("http://", "https://")):
            path = _stored(store, source, lambda: _fetched(source))
        else:
            path = folder / source  # an absolute path stays what it is
        return path, opened(path).size, hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Bad(f"image {shown} cannot be read ({error})") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Bad(f"image {shown} cannot be fetched ({error or type(error).__name__})") from error


def _stored(store: Path, source: str, content: Callable[[], bytes]) -> Path:
    """Return the file of an image that has none, written if it is not there yet."""
    path = store / hashlib.sha256(source.encode()).hexdigest()[:24]
    if not path.is_file():
        told = content()
        Image.open(io.BytesIO(told)).verify()  # what is no image is not kept, but fetched again
        store.mkdir(parents=True, exist_ok=True)
        path.write_bytes(told)
    return path


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data URL must be base64: data:image/png;base64,…")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is broken: {error}") from error


def _fetched(url: str) -> bytes:
    with httpx.Client(timeout=_FETCH_SECONDS, verify=tls_context(), follow_redirects=True) as client:
        return client.get(url).raise_for_status().content


def _clustered(questions: Sequence[Question]) -> tuple[Question, ...]:
    """Number the groups of questions that share images: their answers are not independent."""
    parent: dict[str, str] = {}

    def root(digest: str) -> str:
        while parent.setdefault(digest, digest) != digest:
            digest = parent[digest]
        return digest

    for question in questions:
        for digest in question.digests:
            parent[root(digest)] = root(question.digests[0])
    numbers: dict[str, int] = {}
    return tuple(
        replace(each, cluster=numbers.setdefault(root(each.digests[0]), len(numbers))) for each in questions
    )

"""Real servers, each started once: ours, and plain vLLM with the plugin switched off."""

from __future__ import annotations

import base64
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from promprune_vllm.core.registry import methods
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.server import Server, one_worker, serving
from promprune_vllm.demo.trained import TRAINED
from tests import runner
from tests.conftest import QUESTION, UNMEASURED

MODEL = "demo"
# A block of 32 tokens, so that the prefix cache is hit; a step of 256, so that one image spans several chunks.
OPTIONS = (
    *("--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
    *("--max-model-len", "2048", "--block-size", "32", "--max-num-batched-tokens", "256"),
    *("--max-num-seqs", "32"),
)
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **UNMEASURED}


def measured() -> tuple[tuple[str, ...], dict[str, str]]:
    """Options and variables of a server that counts in the coverage, where there is one; it starts more slowly."""
    variables = {name: os.environ[name] for name in UNMEASURED if name in os.environ}
    # By default vLLM kills its engine at once when it ends, and what was measured there is lost.
    return ("--shutdown-timeout", "15") if variables else (), variables


# Of this folder: none of them should hold its memory while the tests of another folder run.
@pytest.fixture(scope="package")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options, variables = measured()
    yield from _serving(demo_model, tmp_path_factory.mktemp("server"), *options, **variables)


@pytest.fixture(scope="package")
def stock(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _serving(demo_model, tmp_path_factory.mktemp("stock"), VLLM_PLUGINS="")


@pytest.fixture(scope="package")
def every_method(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The trained model, and a request may choose any method for images."""
    allowed = ("--visual-token-allow-methods", ",".join(methods(over_frames=False)))
    # Thousands of images come here, and by default the engine keeps 4 GiB of them.
    little = ("--mm-processor-cache-gb", "0.5")
    yield from _serving(TRAINED, tmp_path_factory.mktemp("every-method"), *allowed, *little)


@pytest.fixture(scope="package")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny Qwen2.5-VL, which takes videos; a request may choose a method that compares frames."""
    directory = tmp_path_factory.mktemp("videos")
    options, variables = measured()
    allowed = ("--visual-token-allow-methods", "evs,vidcom2")
    words = ("--enable-scale-out", "--enable-mm-embeds", "--enable-prompt-tokens-details", *allowed, *options)
    yield from _serving(build_family_model("qwen2_5_vl", directory / "model"), directory, *words, **variables)


def _serving(model: Path, directory: Path, *options: str, **environment: str) -> Iterator[Server]:
    """A server of one engine process; two of them spend a fifth of two cores on polling for each other."""
    words, variables = one_worker([*OPTIONS, *options], {**ENVIRONMENT, **environment})
    with serving(model, *words, log=directory / "log", environment=variables) as running:
        # vLLM schedules no steps of a pooling model ahead, and none where n-grams are the drafts.
        waits = "pooling" in options or any('"ngram"' in option for option in options)
        expected = "v2" if waits and runner.is_v2() else runner.chosen()
        assert runner.in_force(running.log.read_text()) == expected
        yield running


def image_url(photo: str) -> str:
    return data_url(photo_path(photo).read_bytes(), "jpeg")


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def saved(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as the address of its file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return data_url(file.getvalue(), kind.lower())


def noise(seed: str) -> str:
    """An image nobody has asked about yet.

    What a server is to refuse should be of a test's own: stock vLLM answers the next request with an image that it
    has refused by HTTP 500 (docs/upstream.md).
    """
    return saved(Image.frombytes("RGB", (16, 16), random.Random(seed).randbytes(768)), "PNG")


def body(*photos: str, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """A chat request with photographs by name or URL; fields are added at the top level."""
    urls = (photo if ":" in photo else image_url(photo) for photo in photos)
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question})
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 6,
        "ignore_eos": True,
        **fields,
    }


def post(server: Server, path: str, json: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=json, timeout=300)


Series = dict[tuple[str, ...], float]


def series(server: Server) -> Series:
    """Our samples by name and by the values of their labels but the model's, sorted by label."""
    return {
        (each.name, *(each.labels[label] for label in sorted(each.labels) if label != "model_name")): each.value
        for family in server.families("promprune")
        for each in family.samples
    }


def grown(after: Series, before: Series) -> Series:
    """Return what changed, and by how much: rounded, because counters of shares are a rounding error off."""
    changed = {key: round(value - before.get(key, 0), 9) for key, value in after.items()}
    return {key: value for key, value in changed.items() if value}


def ask(server: Server, *photos: str, **fields: Any) -> dict[str, Any]:
    response = post(server, "/v1/chat/completions", body(*photos, **fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer

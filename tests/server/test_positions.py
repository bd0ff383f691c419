"""A request whose positions run far ahead of its tokens: answered, or refused, and the server lives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import build_family_model, serving_dtype
from promprune_vllm.demo.server import Server, is_healthy
from tests.engine.family_facts import UNLOADABLE
from tests.server.conftest import _serving, ask, body, post, saved

# With each commit, the same positions are the subject of tests/engine/test_mrope_reach.py.
pytestmark = [pytest.mark.server, pytest.mark.release]
LONG = 4096
"""Tokens of the context, and all positions that these checkpoints know of."""


MROPE = ["qwen3_vl", "qwen3_5"]  # the one whose engine such prompts once ended, and a hybrid


@pytest.fixture(scope="module", params=MROPE)
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param in UNLOADABLE:
        pytest.skip("this minor of vLLM cannot load the family on a CPU")
    directory = tmp_path_factory.mktemp(request.param)
    model = build_family_model(request.param, directory / "model")
    options = ("--max-model-len", str(LONG), "--limit-mm-per-prompt", '{"image": 200}')
    options += ("--dtype", serving_dtype(request.param))
    yield from _serving(model, directory, *options)


def test_no_number_of_long_images_ends_the_server(qwen: Server) -> None:
    """Each takes 64 positions or more and keeps one token: 150 of them stand at 9,600, twice the context."""
    with Image.open(photo_path("coffee")) as photo:
        strip = saved(photo.convert("RGB").resize((2048, 64)), "JPEG")
    before = ask(qwen, "coffee", visual_token_budget=9)["choices"]
    for images, status in ((150, 200), (200, 400)):
        for budget in (1, {"total": images}):
            request = body(*[strip] * images, visual_token_budget=budget, max_tokens=20)
            response = post(qwen, "/v1/chat/completions", request)
            assert response.status_code == status, response.text
            if status == 400:
                error = response.json()["error"]
                assert error["param"] == "visual_token_budget"
                assert f"limit is {4 * LONG}" in error["message"]
            else:
                kept = response.json()["usage"]["visual_tokens"]["kept"]
                assert (kept, response.json()["usage"]["completion_tokens"]) == (images, 20)
        assert is_healthy(qwen.url)
        assert ask(qwen, "coffee", visual_token_budget=9)["choices"] == before

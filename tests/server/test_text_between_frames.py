"""A model with text between frames over HTTP: methods that compare frames, and what is told of their budgets."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from promprune_vllm import methods
from promprune_vllm.demo.families import build_family_model
from promprune_vllm.demo.server import Server
from tests.clips import Clip
from tests.engine.family_facts import UNLOADABLE
from tests.server.conftest import _serving, grown, measured, series
from tests.server.requests_with_videos import BUDGET, CHAT, answered, asked, photo, refused, told, video

pytestmark = [pytest.mark.server, pytest.mark.release]
FAMILY = "qwen3_vl"
METHODS = tuple(methods(over_frames=True))
CLIP = video(Clip(7, "tall").frames_url())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if FAMILY in UNLOADABLE:
        pytest.skip("this minor of vLLM cannot load the family on a CPU")
    directory = tmp_path_factory.mktemp("between")
    options, variables = measured()
    words = ("--visual-token-allow-methods", ",".join(METHODS), *options)
    yield from _serving(build_family_model(FAMILY, directory / "model"), directory, *words, **variables)


@pytest.mark.parametrize("name", METHODS)
def test_only_visual_tokens_count_and_the_largest_budget_is_told(server: Server, name: str) -> None:
    whole = answered(server, CLIP)
    seen = whole["visual_tokens"]["seen"]
    request = asked(CLIP, visual_token_budget=seen - 1, visual_token_method=name)
    error = refused(server, CHAT, request, "tokens of text between the frames become embeddings too")
    assert error["param"] == BUDGET
    (most,) = map(int, re.findall(r"keeps at most (\d+)", error["message"]))
    before = series(server)
    for kept in (1, 17, most):
        usage = answered(server, CLIP, visual_token_budget=kept, visual_token_method=name)
        assert usage["visual_tokens"] == told(("video", seen, kept))
        assert whole["prompt_tokens"] - usage["prompt_tokens"] == seen - kept
    counted = grown(series(server), before)
    saved = counted["promprune_visual_tokens_saved_total", name, "video"]
    assert saved == 3 * seen - (1 + 17 + most)
    both = answered(server, photo(), CLIP, visual_token_budget=["full", 9], visual_token_method=name)
    assert both["visual_tokens"]["videos"] == [{"seen": seen, "kept": 9}]
    image = asked(photo(), visual_token_budget=9, visual_token_method=name)
    assert refused(server, CHAT, image, "an image has none")["param"] == "visual_token_method"

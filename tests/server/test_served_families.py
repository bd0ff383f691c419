"""Families that people serve, over HTTP: chat, responses and messages with budgets, and the inspector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from promprune_vllm.demo import photo_path
from promprune_vllm.demo.families import build_family_model, has_remote_code, serving_dtype
from promprune_vllm.demo.server import Server, is_healthy
from tests.server.browser import ARTEFACTS, chromium
from tests.server.conftest import _serving, post
from tests.server.requests_by_route import INSPECTED, MESSAGES, RESPONSES, SHORT
from tests.server.test_inspector import select

pytestmark = pytest.mark.server
# A hybrid with each commit, and one whose checkpoint comes with code; tests/engine has the other models.
SERVED = ["qwen3_5", pytest.param("internvl_chat", marks=pytest.mark.release)]
ROUTES = {"/v1/chat/completions": SHORT, "/v1/responses": RESPONSES, "/v1/messages": MESSAGES}


@pytest.fixture(scope="module", params=SERVED)
def family_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp(request.param)
    model = build_family_model(request.param, directory / "model")
    options = ["--dtype", serving_dtype(request.param), "--max-model-len", "2048"]
    if has_remote_code(request.param):
        options.append("--trust-remote-code")
    yield from _serving(model, directory, *options)


def usage(server: Server, path: str, budget: Any) -> dict[str, Any]:
    fields = {} if budget is None else {"visual_token_budget": budget}
    response = post(server, path, {**ROUTES[path], **fields})
    assert response.status_code == 200, response.text
    told = response.json()["usage"]
    if budget is not None:
        kept = told["visual_tokens"]["kept"]
        assert response.headers["x-visual-tokens-kept"] == str(kept)
    return dict(told)


def prompt_tokens(told: dict[str, Any]) -> int:
    return int(told.get("prompt_tokens", told.get("input_tokens")))


@pytest.mark.parametrize("path", ROUTES)
def test_a_budget_shortens_the_prompt_by_what_it_drops(family_server: Server, path: str) -> None:
    whole = usage(family_server, path, None)
    seen = whole["visual_tokens"]["seen"]
    assert whole["visual_tokens"]["kept"] == seen > 100
    for budget, kept in ((33, 33), ("25%", round(seen / 4)), (1, 1), (100_000, seen)):
        told = usage(family_server, path, budget)
        assert told["visual_tokens"]["seen"] == seen
        assert told["visual_tokens"]["kept"] == kept
        assert prompt_tokens(whole) - prompt_tokens(told) == seen - kept
    refused = post(family_server, path, {**ROUTES[path], "visual_token_budget": "many"})
    assert refused.status_code == 400
    assert is_healthy(family_server.url)


def test_the_overlay_shows_what_was_kept(family_server: Server, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["family_server"]
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    drawn: Path = ARTEFACTS / f"overlay-{name}.png"
    photo = photo_path("coffee")
    result = select(family_server, str(photo), "--budget", "33", "--out", str(drawn))
    assert result.exit_code == 0, result.output
    with Image.open(photo) as original, Image.open(drawn) as overlay:
        # Dropped tokens are darkened: with 33 tokens, most of the picture is.
        light = [sum(image.convert("L").resize((32, 32)).tobytes()) for image in (original, overlay)]
        assert light[1] < 0.8 * light[0]
    told = post(family_server, "/v1/visual_tokens/inspect", {**INSPECTED, "visual_token_budget": 33}).json()
    seen = usage(family_server, "/v1/chat/completions", None)["visual_tokens"]["seen"]
    with chromium() as browser:
        from playwright.sync_api import expect

        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{family_server.url}/promprune")
        page.set_input_files("#file", photo)
        expect(page.locator("rect.cell")).to_have_count(seen, timeout=120_000)
        captions = page.locator("figure:has(rect.cell) figcaption").all_text_contents()
        page.screenshot(path=ARTEFACTS / f"inspector-{name}.png")
    assert sum(len(group["kept"]) for group in told["groups"]) == 33
    widths = [told["boxes"][first][2] - told["boxes"][first][0] for first in told["views"]]
    assert len(captions) == len(widths)
    for caption, width in zip(captions, widths, strict=True):
        assert ("whole" in caption) == (len(widths) > 1 and width == max(widths))

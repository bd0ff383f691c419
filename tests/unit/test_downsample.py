"""The control ``downsample``: the server's means of cells, and the client's smaller image."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from promprune_vllm import VisionFeatures, select
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation import run
from promprune_vllm.evaluation.plan import Plan
from promprune_vllm.evaluation.records import FILE, read
from promprune_vllm.evaluation.sender import Way
from promprune_vllm.evaluation.smaller import on_the_client, size_within
from promprune_vllm.evaluation.target import find_target
from promprune_vllm.evaluation.tasks import tasks_by_name
from promprune_vllm.methods.controls import Cells
from tests.unit.evaluated import STATE, counted, draw, native_tokens, reply, server

WAYS = (Way.full(2), Way("promprune", 16, 2), Way("downsample", 16, 2), Way("downsample", "25%", 2))


@pytest.mark.parametrize("rows", range(1, 8))
def test_cells_cover_every_grid_once_and_are_nearly_equal(rows: int) -> None:
    for columns in range(1, 8):
        for keep in range(1, rows * columns):
            cells = Cells.of(rows, columns, keep, torch.device("cpu"))
            covered = torch.zeros(rows, columns, dtype=torch.int64)
            tokens = torch.arange(rows * columns, dtype=torch.float64)
            means, middles = cells.mean(tokens[:, None]), cells.middle()
            for place in range(keep):
                here = (
                    slice(int(cells.top[place]), int(cells.bottom[place])),
                    slice(int(cells.left[place]), int(cells.right[place])),
                )
                covered[here] += 1
                assert means[place] == pytest.approx(float(tokens.view(rows, columns)[here].mean()))
                assert middles[place] in tokens.view(rows, columns)[here]
            assert (covered == 1).all()
            heights = cells.bottom - cells.top
            assert heights.max() - heights.min() <= 1


def test_a_whole_factor_is_plain_average_pooling_and_other_shapes_have_square_cells() -> None:
    x = torch.randn(576, 5, generator=torch.Generator().manual_seed(0))
    selection = select(VisionFeatures(projected=x, grid=(1, 24, 24)), 64, "downsample")
    assert selection.rows is not None
    pooled = torch.nn.functional.adaptive_avg_pool2d(x.view(24, 24, 5).permute(2, 0, 1), 8).flatten(1).T
    assert torch.allclose(selection.rows, pooled, atol=1e-6)
    assert selection.indices.tolist()[:3] == [25, 28, 31]  # the middle of 3 x 3 tokens each
    for rows, columns in ((8, 32), (32, 8)):
        cells = Cells.of(rows, columns, 16, torch.device("cpu"))
        assert {*(cells.bottom - cells.top).tolist(), *(cells.right - cells.left).tolist()} == {4}


def test_the_smaller_image_is_the_largest_with_no_more_tokens() -> None:
    with server(tokens=native_tokens) as (url, _):
        target = find_target(url)
        for size in ((336, 336), (1000, 300)):
            whole = native_tokens(*size)
            for budget, most in ((9, 9), (20, 20), ("50%", round(whole / 2)), (10_000, whole)):
                found = size_within(target, budget, size)
                assert native_tokens(*found) <= most
                larger = [side + round(side / 20) + 1 for side in found]
                assert native_tokens(*larger) > most or found == size
        with pytest.raises(EvaluationError, match=r"has 2 tokens or fewer here: the smallest .* has 4\."):
            size_within(target, 2, (336, 336))


def test_where_smaller_images_have_as_many_tokens_the_server_pools() -> None:
    with server() as (url, _):
        assert on_the_client(find_target(url), WAYS, (336, 336)) == (WAYS, [])
    with server(tokens=None) as (url, _):
        assert on_the_client(find_target(url), WAYS[:2], (336, 336)) == (WAYS[:2], [])  # nothing to count
        with pytest.raises(EvaluationError, match="does not count the tokens of images by their sizes"):
            on_the_client(find_target(url), WAYS, (336, 336))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_smallest_image_of_a_whole_tile_ends_no_run(tmp_path: Path, allowed: bool) -> None:
    """The count of a tiled model: an overview, and a tile for each 168 x 168 pixels."""

    def tiles(width: int, height: int) -> int:
        return 24 * (1 + -(-width // 168) * -(-height // 168))

    names = ("promprune", "downsample") if allowed else ("promprune",)
    methods: list[dict[str, Any]] = [{"name": name, "options": {}} for name in names]
    ways = (*WAYS[:3], Way("downsample", 72, 2))
    plan = Plan(ways, tasks_by_name(["presence"]), concurrency=2)
    with server(_kept(tiles), tokens=tiles, state={**STATE, "allowed_methods": methods}) as (url, _):
        target = find_target(url)
        _, (note,) = on_the_client(target, ways, (336, 336))
        assert "No smaller image has 16 tokens or fewer here: the smallest that this model takes has 48." in note
        run.evaluate(target, plan, tmp_path, Console(quiet=True), lambda *key: _Large(draw(*key)))
    answers = read(tmp_path / FILE).answers.values()
    asked = {answer.budget for answer in answers if answer.method == "downsample"}
    assert asked == ({"72", "16"} if allowed else {"72"})
    told = (tmp_path / "summary.md").read_text()
    assert "its tokens: 48 at 72." in told
    if allowed:
        assert "the server's method, means of tokens" in note
        assert "No image has so few at 16; there it is the server's method" in told
    else:
        assert "'downsample' was left out at budget 16" in note


def _kept(tokens: Any) -> Any:
    """Replies of a server with such tokens."""

    def kept(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, content = reply({**body, "visual_token_budget": "full"})
        seen = tokens(*_image(body).size)
        width, height = _image(body).size
        told = counted({**body, "images": [{"width": width, "height": height}]}, tokens)
        kept = seen if body["visual_token_budget"] == "full" else told["images"][0]["kept"]
        content["usage"]["visual_tokens"] = {"seen": seen, "kept": kept}
        return status, content

    return kept


def test_a_server_of_native_resolution_gets_a_smaller_image_and_no_method(tmp_path: Path) -> None:
    def kept(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, content = reply(body)
        tokens = native_tokens(*_image(body).size)
        most = tokens if body["visual_token_budget"] == "full" else body["visual_token_budget"]
        content["usage"]["visual_tokens"] = {"seen": tokens, "kept": min(tokens, most)}
        return status, content

    plan = Plan(WAYS, tasks_by_name(["presence"]), concurrency=2)
    with server(kept, tokens=native_tokens, state={**STATE, "allowed_methods": STATE["allowed_methods"][:1]}) as (
        url,
        got,
    ):
        run.evaluate(find_target(url), plan, tmp_path, Console(quiet=True), lambda *key: _Large(draw(*key)))
    sent = {
        (body.get("visual_token_method"), body["visual_token_budget"], native_tokens(*_image(body).size))
        for body in got
    }
    assert sent == {(None, "full", 144), ("promprune", 16, 144), (None, "full", 16), (None, "full", 36)}
    answers = read(tmp_path / FILE).answers.values()
    assert {(answer.method, answer.budget, answer.kept) for answer in answers} == {
        ("full", "full", 144),
        ("promprune", "16", 16),
        ("downsample", "16", 16),
        ("downsample", "25%", 36),
    }
    assert (
        "an image that the client made smaller; its tokens: 36 at 25%, 16 at 16."
        in (tmp_path / "summary.md").read_text()
    )


class _Large:
    """A scene of 336 x 336 pixels."""

    def __init__(self, scene: Any) -> None:
        self._scene = scene
        self.questions = scene.questions

    def image(self) -> Image.Image:
        picture: Image.Image = self._scene.image().resize((336, 336))
        return picture


def _image(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

"""Pictures of what is kept: the lit cells lie where the pixels are."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.core.geometry import Box, grid
from promprune_vllm.errors import InspectError
from promprune_vllm.overlay.client import InspectClient
from promprune_vllm.overlay.drawing import COVERING, SALIENT, caption, contact_sheet, overlay, sheet, titled


def reply(boxes: list[Box | None], kept: list[int], salient: list[int] | None, **more: Any) -> dict[str, Any]:
    """What a server tells of an image of 80 x 40 pixels."""
    group = {"tokens": [], "kept": kept, "salient": salient, "saliency": None, "entropy": 0.25, "report": {}}
    return {
        **{"width": 80, "height": 40, "seen": len(boxes), "kept": len(kept), "views": [0], "boxes": boxes},
        **{"indices": kept, "groups": [group], "method": {"name": "promprune", "options": {}}},
        **more,
    }


def test_kept_cells_are_lit_in_their_stage_and_the_rest_is_dark() -> None:
    image = Image.new("RGB", (80, 40), (200, 200, 200))
    drawn = np.asarray(overlay(image, reply(list(grid(2, 4, (0, 0, 80, 40))), [1, 6], [6])))
    assert drawn.shape == (40, 80, 3)  # cells of 20 pixels are large enough
    for token in range(8):
        cell = drawn[token // 4 * 20 : token // 4 * 20 + 20, token % 4 * 20 : token % 4 * 20 + 20]
        inside = cell[2:-2, 2:-2]
        assert (inside == (200 if token in (1, 6) else 50)).all()
        if token in (1, 6):
            assert (cell[0] == (SALIENT if token == 6 else COVERING)).all()


def test_small_images_are_drawn_larger() -> None:
    told = reply(list(grid(10, 20, (0, 0, 80, 40))), [0], None)
    drawn = overlay(Image.new("RGB", (80, 40), (200, 200, 200)), told)
    assert drawn.size == (280, 140)
    assert drawn.getpixel((7, 7)) == (200, 200, 200)
    assert drawn.getpixel((21, 7)) == (50, 50, 50)


def test_views_stand_side_by_side_and_newlines_nowhere() -> None:
    whole, crops = grid(1, 2, (0, 0, 80, 40)), grid(1, 3, (0, 0, 80, 40))
    told = reply([*whole, *crops, None], [0, 4, 5], None, views=[0, 2])
    drawn = overlay(Image.new("RGB", (80, 40), (200, 200, 200)), told)
    assert drawn.width == 2 * 80 + 8
    assert drawn.getpixel((20, 20)) == (200, 200, 200)  # the left half of the whole image
    assert drawn.getpixel((60, 20)) == (50, 50, 50)
    assert drawn.getpixel((88 + 10, 20)) == (50, 50, 50)
    assert drawn.getpixel((88 + 70, 20)) == (200, 200, 200)  # the last crop


def test_a_contact_sheet_has_each_frame_under_what_it_keeps() -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (200, 200, 200)).save(file, "PNG")  # a picture may be smaller than the frame
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    frames = [{"kept": kept, "picture": picture} for kept in ([1], [], [0, 1], *[[]] * 6)]
    told = reply(list(grid(1, 2, (0, 0, 80, 40))), [1, 4, 5], [5], seen=18, frames=frames)
    drawn = contact_sheet(told)
    high = titled(Image.new("RGB", (40, 20)), "").height
    assert drawn.size == (8 * 40 + 7 * 8, 2 * high + 8)  # nine frames: eight, and one below
    top = high - 20

    def inside(frame: int, token: int) -> Any:
        return drawn.getpixel((frame * 48 + token * 20 + 10, top + 10))

    lit = {(frame, token) for frame in range(8) for token in range(2) if inside(frame, token) == (200, 200, 200)}
    assert lit == {(0, 1), (2, 0), (2, 1)}
    assert drawn.getpixel((2 * 48 + 20, top)) == SALIENT
    assert drawn.getpixel((2 * 48, top)) == COVERING


def test_another_image_is_refused() -> None:
    with pytest.raises(ValueError, match="80 x 40"):
        overlay(Image.new("RGB", (40, 80)), reply(list(grid(1, 1, (0, 0, 80, 40))), [0], None))


def test_captions_and_sheets() -> None:
    boxes: list[Box | None] = list(grid(2, 4, (0, 0, 80, 40)))
    assert caption(reply(boxes, [1, 6], [6])) == "promprune: 2 of 8, 1 salient, H 0.25"
    assert caption(reply(boxes, list(range(8)), None, method=None)) == "all 8 tokens"
    first = {"text": " red", "confidence": 0.8125}
    sure = {**first, "first": None}
    assert caption(reply(boxes, [1, 6], [6], answer=sure)).endswith(', H 0.25, "red" (0.81)')
    again = {"text": "blue", "confidence": 0.97, "first": first}
    assert caption(reply(boxes, [1, 6], [6], answer=again)).endswith('"red" (0.81), then "blue"')
    untold = {"text": "red", "confidence": None, "first": None}
    assert caption(reply(boxes, [1, 6], [6], answer=untold)).endswith(', "red"')
    small = titled(Image.new("RGB", (80, 40)), "a title that is much longer than its picture")
    assert small.width == 80
    assert small.height > 40
    made = sheet([[small] * 3, [small]], columns=2)
    assert made.size == (2 * 80 + 8, 3 * small.height + 2 * 8)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["select", *arguments])


def test_the_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    nobody = "http://127.0.0.1:9"
    assert "No server answers at http://127.0.0.1:9" in run(str(image), "--url", nobody).output
    assert "cannot be read" in run(str(tmp_path / "none.png"), "--url", nobody).output
    for both in (("--budget", "64", "--budgets", "1,2"), ("--method", "random", "--compare", "random,uniform")):
        result = run(str(image), *both)
        assert result.exit_code == 2
        assert "give only one of these options" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, {"detail": "Not Found"}, "--no-inspector"),
        (401, {"error": "Unauthorized"}, "--api-key"),
        (400, {"error": {"message": "visual_token_budget must be an integer"}}, "must be an integer"),
        (502, None, "answered 502"),
    ],
)
def test_what_a_server_refuses_is_said(tmp_path: Path, status: int, body: Any, said: str) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    content = "bad gateway" if body is None else json.dumps(body)
    with InspectClient("http://server/v1/", None) as server:
        server._client = httpx.Client(
            base_url=server.url, transport=httpx.MockTransport(lambda _: httpx.Response(status, text=content))
        )
        with pytest.raises(InspectError, match=said):
            server.inspect(image, 64)

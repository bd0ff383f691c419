"""Videos in the inspector, on its page and from the command line; and the route that counts them."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.demo.server import Server
from tests.clips import Clip
from tests.server.browser import ARTEFACTS
from tests.server.conftest import image_url, post
from tests.server.requests_with_videos import BUDGET, CLIP, URLS, answered, refused, video
from tests.server.test_inspector import INSPECT, PATIENCE_MS, Visit, browser, look  # noqa: F401  a fixture
from tests.server.test_reply import headers

pytestmark = [pytest.mark.server, pytest.mark.release]
COUNT, METHOD = "/v1/visual_tokens/count", "visual_token_method"
EACH = 15
"""Tokens of a frame."""
LONG = Clip(32)  # as many frames as vLLM takes of a video by default


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(LONG.mp4())
    return path


@pytest.mark.parametrize("form", URLS)
@pytest.mark.parametrize(
    ("budget", "method", "kept"),
    [(7, None, 7), ({"per_frame": 2}, None, None), ("full", None, None), (13, "evs", 13), (13, "vidcom2", 13)],
)
def test_the_endpoint_tells_what_each_frame_keeps(
    videos: Server, form: str, budget: Any, method: str | None, kept: int | None
) -> None:
    url, frames = URLS[form]
    response = post(videos, INSPECT, {"video": url, BUDGET: budget, METHOD: method})
    assert response.status_code == 200, response.text
    told = response.json()
    kept = kept or frames * (2 if budget != "full" else EACH)
    assert headers(response) == (str(told["seen"]), str(told["kept"])) == (str(EACH * frames), str(kept))
    assert len(told["boxes"]) == EACH
    assert (told["width"], told["height"], told["boxes"][-1][2:]) == (140, 84, [140, 84])
    assert [(n * EACH) + i for n, frame in enumerate(told["frames"]) for i in frame["kept"]] == told["indices"]
    counts = [len(frame["kept"]) for frame in told["frames"]]
    assert (len(counts), sum(counts)) == (frames, kept)
    assert max(counts) - min(counts) <= 1 or method
    assert all(frame["picture"].startswith("data:image/jpeg;base64,") for frame in told["frames"])
    assert (told["method"] or {}).get("name") == (None if budget == "full" else method or "promprune")
    assert told == {**look_at(videos, url, budget, method), "frames": told["frames"]}
    assert answered(videos, video(url), **{BUDGET: budget, METHOD: method})["visual_tokens"]["kept"] == kept


def look_at(server: Server, url: str, budget: Any, method: str | None = None, **fields: Any) -> dict[str, Any]:
    """A look without pictures."""
    body = {"video": url, "pictures": False, BUDGET: budget, METHOD: method, **fields}
    response = post(server, INSPECT, body)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    assert {frame["picture"] for frame in told["frames"]} == {None}
    return told


def test_a_question_about_a_clip_is_answered(videos: Server) -> None:
    answer = look_at(videos, URLS["mp4"][0], 9, text="What?", visual_token_escalate=1)["answer"]
    assert (answer["kept"], answer["first"]["kept"], answer["below"]) == (45, 9, 1)


def test_what_is_no_image_and_no_video_is_refused(videos: Server) -> None:
    url, picture = URLS["mp4"][0], image_url("coffee")
    for body, message in (
        ({}, "one image as `image`, or one video as `video`"),
        ({"image": picture, "video": url}, "one image as `image`, or one video as `video`"),
        ({"image": url}, "This is a video: send it as `video`"),
        ({"video": url, "detail": "low"}, "detail is for images"),
        ({"image": picture, METHOD: "evs"}, "evs"),
        ({"video": "data:video/mp4;base64,AAAA"}, ""),
        ({"video": url, BUDGET: [1, 2]}, "has 2 entries"),
    ):
        refused(videos, INSPECT, {BUDGET: 5, **body}, message)
    assert look(videos, picture, visual_token_budget=5)["frames"] is None


def test_clips_are_counted_as_a_chat_counts_them(videos: Server) -> None:
    urls = [URLS["mp4"][0], Clip(4, "portrait").mp4_url()]
    for budget in (None, 7, [{"per_frame": 2}, "full"], {"total": 20}, "10%"):
        counted = post(videos, COUNT, {"videos": urls, BUDGET: budget, METHOD: None if budget == 7 else "evs"})
        assert counted.status_code == 200, counted.text
        told = counted.json()
        used = answered(videos, *map(video, urls), **{BUDGET: budget})["visual_tokens"]
        assert {name: told[name] for name in used} == used
        assert told["kv_cache"]["saved"] == (used["seen"] - used["kept"]) * told["kv_cache"]["bytes_per_token"]
    size = {"width": 640, "height": 360}
    assert post(videos, COUNT, {"images": [size], BUDGET: 5}).json()["videos"] == []
    for body, message in (
        ({"images": [size], "videos": urls}, 'either "images" with their sizes or "videos" with their URLs'),
        ({}, 'either "images" with their sizes or "videos" with their URLs'),
        ({"videos": urls, "detail": ["low", "low"]}, "detail is for images"),
        ({"videos": urls, BUDGET: [1, 2, 3]}, "has 3 entries"),
        ({"videos": ["data:video/mp4;base64,AAAA"]}, ""),
        ({"images": [size], BUDGET: {"per_frame": 2}}, "no video"),
        ({"images": [size], BUDGET: 5, METHOD: "evs"}, "'evs' compares the frames of a video"),
        ({"images": [size], METHOD: "random"}, "visual_token_method must be one of promprune, evs, vidcom2"),
        ({"videos": urls, METHOD: "random"}, "visual_token_method must be one of promprune, evs, vidcom2"),
    ):
        refused(videos, COUNT, body, message)
    assert post(videos, COUNT, {"images": [size], BUDGET: "full", METHOD: "evs"}).status_code == 200


@contextmanager
def changing(*files: bytes) -> Iterator[str]:
    """The URL of a clip that is another one at each load."""
    each = iter(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = next(each)
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}/clip.mp4"
        web.shutdown()
        thread.join()


def test_a_clip_that_changes_while_it_is_inspected_is_not_shown(videos: Server) -> None:
    """Also if the other clip has as many tokens: seven frames are sampled to six."""
    for frames, status in ((12, 409), (6, 409), (7, 200)):
        with changing(CLIP.mp4(), Clip(frames).mp4()) as url:
            response = post(videos, INSPECT, {"video": url, BUDGET: 9})
        assert response.status_code == status, response.text
        told = response.json()
        assert status == 200 or "at this URL changed between two loads" in told["error"]["message"]
        assert status == 409 or (told["seen"], told["kept"]) == (45, 9)


def select(server: Server, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["select", "--url", server.url, *arguments])


def test_a_contact_sheet_from_the_command_line(videos: Server, clip_file: Path, tmp_path: Path) -> None:
    sheet = ARTEFACTS / "clip.png"
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    words = ("--budget", "25%", "--compare", "promprune,evs", "--columns", "1", "--out", str(sheet), "--json")
    result = select(videos, str(clip_file), *words)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(each["method"]["name"], each["kept"]) for each in told] == [("promprune", 60), ("evs", 60)]
    for each in told:
        assert sum(len(frame["kept"]) for frame in each["frames"]) == 60
        assert [{*frame} for frame in each["frames"]] == [{"kept"}] * 16
    with Image.open(sheet) as drawn:
        assert drawn.width > 8 * 140
        assert drawn.height > 4 * 84
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for file in (broken, tmp_path / "none.mp4"):
        result = select(videos, str(file))
        assert (result.exit_code, str(file) in result.output.replace("\n", "")) == (1, True)


@pytest.mark.parametrize("screen", [(1440, 1000, "light"), (390, 844, "dark")], ids=["wide", "narrow"])
def test_the_page_shows_every_frame(
    videos: Server,
    browser: Any,  # noqa: F811
    clip_file: Path,
    screen: tuple[int, int, str],
) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect

    width, height, scheme = screen
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    visit = Visit(context.new_page(), videos)
    page = visit.opened()
    expect(page.locator("#choose")).to_have_text("Choose an image or a video", timeout=PATIENCE_MS)
    offered = page.locator("#method option").all_inner_texts
    assert offered() == ["promprune"]
    page.set_input_files("#file", clip_file)
    thumbs, cells = page.locator("#thumbs button"), page.locator("rect.cell")
    expect(thumbs).to_have_count(16, timeout=PATIENCE_MS)
    assert offered() == ["promprune", "evs", "vidcom2"]
    page.locator("#budget").fill("60")
    expect(page.locator("#counts dd[data-name=kept]")).to_have_text("60", timeout=PATIENCE_MS)
    page.select_option("#method", "evs")
    expect(page.locator("#counts dd[data-name=method]")).to_have_text("evs", timeout=PATIENCE_MS)
    told = look_at(videos, LONG.mp4_url(), 60, "evs", text="What is in the image?")
    assert thumbs.all_inner_texts() == [str(len(frame["kept"])) for frame in told["frames"]]
    expect(cells).to_have_count(EACH)
    page.locator("#frame").focus()
    page.keyboard.press("End")  # the last frame, with the keyboard alone
    expect(thumbs.last).to_have_attribute("aria-pressed", "true")
    lit = page.locator("rect.cell:not(.dropped)").evaluate_all(
        "all => all.map(cell => Number(cell.dataset.token))"
    )
    assert lit == [15 * EACH + token for token in told["frames"][-1]["kept"]]
    thumbs.nth(8).click()
    expect(page.locator("#views figcaption")).to_contain_text(
        f"clip.mp4, frame 9: {len(told['frames'][8]['kept'])} of {EACH} tokens kept"
    )
    page.click("#send")
    for side in ("full", "pruned"):
        expect(page.locator(f"#time-{side}")).to_contain_text("first token after", timeout=PATIENCE_MS)
    expect(page.locator("#sureness")).to_contain_text("Answer with 60 tokens", timeout=PATIENCE_MS)
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"clip-{width}.png", full_page=True)
    assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    results = Axe().run(page)
    assert not results.violations_count, results.generate_report()
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": _picture()})
    expect(page.locator("#frames")).to_be_hidden(timeout=PATIENCE_MS)
    assert offered() == ["promprune"]
    assert (visit.said, visit.outside()) == ([], [])
    context.close()


def _picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(CLIP.pixels[0]).save(file, "PNG")
    return file.getvalue()

"""The inspector: its endpoint, and its page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.core.registry import methods
from promprune_vllm.demo import photo_path
from promprune_vllm.demo.scenes import make_scene
from promprune_vllm.demo.server import Server
from tests.server.browser import ARTEFACTS, chromium
from tests.server.conftest import ask, image_url, post, saved

pytestmark = pytest.mark.server
INSPECT = "/v1/visual_tokens/inspect"
PATIENCE_MS = 120_000


def look(server: Server, image: str, **fields: Any) -> dict[str, Any]:
    response = post(server, INSPECT, {"image": image, **fields})
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def picture(size: tuple[int, int], mode: str = "RGB", kind: str = "PNG") -> str:
    return saved(Image.new(mode, size, 128 if mode in ("L", "P") else None), kind)


def test_the_endpoint_tells_what_is_kept(server: Server) -> None:
    told = look(server, image_url("coffee"), visual_token_budget=64)
    assert (told["width"], told["height"], told["seen"], told["kept"]) == (600, 400, 576, 64)
    assert told["indices"] == sorted(set(told["indices"]))
    assert len(told["indices"]) == 64
    (group,) = told["groups"]
    assert group["kept"] == told["indices"]
    assert group["tokens"] == list(range(576))
    assert len(group["saliency"]) == 576
    order = sorted(range(576), key=lambda i: (-group["saliency"][i], i))
    assert sorted(group["salient"]) == sorted(order[: len(group["salient"])])
    assert set(group["salient"]) <= set(told["indices"])
    assert group["report"]["saliency_tokens"] == len(group["salient"])
    assert 0 < group["entropy"] < 1
    assert told["method"]["name"] == "promprune"
    assert told["method"]["options"]["mu"] == 0.42
    assert told["selection_ms"] > 0
    assert told["kv_cache"]["saved"] == 512 * told["kv_cache"]["bytes_per_token"]
    # The tower sees the square in the middle of a landscape.
    assert told["boxes"][0][:2] == [100.0, 0.0]
    assert told["boxes"][-1][2:] == [500.0, 400.0]
    assert told["views"] == [0]


def test_looking_again_encodes_nothing_anew_and_tells_the_same(server: Server) -> None:
    first = look(server, image_url("rocket"), visual_token_budget=80)
    before = server.metrics("promprune")
    again = look(server, image_url("rocket"), visual_token_budget=80)
    after = server.metrics("promprune")
    assert again == first  # the very selection: its time is the same
    batches = "promprune_encoder_batch_tokens_count"
    assert after[batches] == before[batches]


def test_a_chat_request_uses_the_rows_that_were_looked_at(server: Server) -> None:
    look(server, image_url("chelsea"), visual_token_budget=70)
    before = server.metrics("promprune")
    ask(server, "chelsea", visual_token_budget=70)
    batches = "promprune_encoder_batch_tokens_count"
    assert server.metrics("promprune")[batches] == before[batches]


def test_everything_kept_needs_no_method(server: Server) -> None:
    told = look(server, image_url("coffee"), visual_token_budget="full")
    assert told["kept"] == told["seen"] == 576
    assert told["indices"] == list(range(576))
    assert (told["method"], told["groups"], told["selection_ms"]) == (None, [], None)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"visual_token_budget": 0}, "visual_token_budget"),
        ({"visual_token_budget": [1, 2]}, "visual_token_budget"),
        ({"visual_token_method": "nothing"}, "visual_token_method"),
        ({"budget": 64}, "budget"),
        ({"detail": "most"}, "detail"),
        ({"text": "x" * 5000}, "text"),
        ({"image": ""}, "image"),
        ({"image": "data:text/plain;base64,aGVsbG8="}, "image"),
        ({"image": "file:///etc/passwd"}, ""),
        ({"image": picture((1, 20_000))}, ""),
    ],
)
def test_what_cannot_be_looked_at_gets_one_sentence(server: Server, fields: dict[str, Any], wrong: str) -> None:
    response = post(server, INSPECT, {"image": image_url("rocket"), **fields})
    if response.status_code == 200:  # a strange shape may be fine for the model
        assert fields["image"].startswith("data:image/png")
    else:
        assert 400 <= response.status_code < 500, response.text
        error = response.json()["error"]
        assert wrong in error["message"] or wrong in (error["param"] or "")
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("P", "GIF")])
def test_images_of_every_mode(server: Server, mode: str, kind: str) -> None:
    told = look(server, picture((90, 60), mode, kind), visual_token_budget=10)
    assert (told["width"], told["height"], told["kept"]) == (90, 60, 10)


def select(server: Server, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["select", "--url", server.url, *arguments])


def test_overlays_from_the_command_line(server: Server, tmp_path: Path) -> None:
    photos = [str(photo_path("coffee")), str(photo_path("chelsea"))]
    strip = tmp_path / "strip.png"
    result = select(server, *photos, "--budgets", "32,25%", "--out", str(strip), "--json")
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(Path(each["file"]).stem, each["kept"]) for each in told] == [
        *(("coffee", 32), ("coffee", 144), ("chelsea", 32), ("chelsea", 144))
    ]
    with Image.open(strip) as drawn:
        assert drawn.width > drawn.height / 2 > 300  # two rows of two
    refused = select(server, photos[0], "--compare", "promprune,divprune")
    assert refused.exit_code == 1
    assert "--visual-token-allow-methods" in " ".join(refused.output.split())


def test_every_method_side_by_side(every_method: Server) -> None:
    """The picture of docs/methods.md."""
    names = list(methods(over_frames=False))
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    sheet = ARTEFACTS / "methods.png"
    words = ("--compare", ",".join(names), "--text", "what is in the image ?", "--out", str(sheet), "--json")
    result = select(every_method, str(photo_path("coffee")), "--budget", "64", *words)
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(each["method"]["name"], each["kept"]) for each in told] == [(name, 64) for name in names]
    assert len({tuple(each["indices"]) for each in told}) > len(names) / 2  # of one split, some are alike here
    staged = {each["method"]["name"] for each in told if each["groups"][0]["salient"] is not None}
    assert staged == {"promprune", "split-0", "split-25", "split-50", "split-75"}
    with Image.open(sheet) as drawn:
        assert drawn.width > 1600


# ---- the page -----------------------------------------------------------------------------------------------


@dataclass
class Visit:
    """A page and what it did behind the scenes."""

    page: Any
    server: Server
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def opened(self) -> Any:
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{self.server.url}/promprune")
        self.page.set_default_timeout(PATIENCE_MS)
        return self.page

    def outside(self) -> list[str]:
        own = (self.server.url, "data:", f"blob:{self.server.url}")
        return [url for url in self.asked if not url.startswith(own)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture(params=[(1440, 1000, "light"), (390, 844, "dark")], ids=["wide", "narrow"])
def visit(request: pytest.FixtureRequest, browser: Any, server: Server) -> Iterator[Visit]:
    width, height, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    yield Visit(context.new_page(), server)
    context.close()


def lit(page: Any) -> list[int]:
    cells = page.locator("rect.cell:not(.dropped)")
    return [int(token) for token in cells.evaluate_all("all => all.map(cell => cell.dataset.token)")]


def test_the_page_shows_what_the_endpoint_tells(visit: Visit, request: pytest.FixtureRequest) -> None:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import expect

    page = visit.opened()
    page.set_input_files("#file", photo_path("coffee"))
    expect(page.locator("rect.cell")).to_have_count(576, timeout=PATIENCE_MS)
    slider = page.locator("#budget")
    slider.focus()
    slider.press("End")  # with the keyboard alone
    expect(page.locator("rect.cell:not(.dropped)")).to_have_count(576, timeout=PATIENCE_MS)
    slider.fill("64")
    expect(page.locator("rect.cell:not(.dropped)")).to_have_count(64, timeout=PATIENCE_MS)
    told = look(visit.server, image_url("coffee"), visual_token_budget=64, text="What is in the image?")
    assert lit(page) == told["indices"]
    salient = page.locator("rect.cell.salient").evaluate_all("all => all.map(cell => Number(cell.dataset.token))")
    assert salient == sorted(told["groups"][0]["salient"])
    assert "64 of 576" in page.locator("#views figcaption").inner_text()
    assert page.locator("#counts dd[data-name=kept]").inner_text() == "64"

    page.fill("#question", "What is on the table?")
    page.locator("#question").press("Enter")
    for side in ("full", "pruned"):
        expect(page.locator(f"#time-{side}")).to_contain_text("first token after", timeout=PATIENCE_MS)
        expect(page.locator(f"#answer-{side}")).not_to_be_empty()
    full, pruned = (int(page.locator(f"#time-{side}").inner_text().split()[-3]) for side in ("full", "pruned"))
    assert full - pruned == 512
    sureness = page.locator("#sureness")
    expect(sureness).to_contain_text(re.compile(r"^Answer with 64 tokens: .+ Confidence 0(\.[0-9]+)?\.$"))
    page.fill("#below", "0.9")
    page.locator("#question").press("Enter")
    expect(sureness).to_contain_text(
        re.compile(r", below 0\.9: asked again with all 576 tokens: ."), timeout=PATIENCE_MS
    )
    assert int(page.locator("#time-pruned").inner_text().split()[-3]) == pruned, (
        "that column is of the kept tokens"
    )
    expect(page.locator("#strip-saved")).to_contain_text(re.compile("[0-9]"))
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"inspector-{request.node.callspec.id}.png", full_page=True)
    page.check("#heat")
    page.locator("#picture").screenshot(path=ARTEFACTS / f"saliency-{request.node.callspec.id}.png")
    assert not page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    results = Axe().run(page)
    assert not results.violations_count, results.generate_report()
    assert (visit.said, visit.outside()) == ([], [])


def test_a_question_about_a_scene_is_answered_with_every_ninth_token(
    browser: Any, every_method: Server, tmp_path: Path
) -> None:
    """The screenshot of the README: a model that answers, and a choice of methods."""
    from playwright.sync_api import expect

    scene = make_scene("scattered", 3)
    question = next(each for each in scene.questions() if each.task == "digit")
    scene.image().save(tmp_path / "scene.png")
    page = browser.new_page(viewport={"width": 1280, "height": 760})
    page.goto(f"{every_method.url}/promprune")
    page.set_input_files("#file", tmp_path / "scene.png")
    expect(page.locator("rect.cell:not(.dropped)")).to_have_count(64, timeout=PATIENCE_MS)
    page.select_option("#method", "uniform")
    expect(page.locator("#counts dd[data-name=method]")).to_have_text("uniform", timeout=PATIENCE_MS)
    page.select_option("#method", "promprune")
    expect(page.locator("#counts dd[data-name=method]")).to_have_text("promprune", timeout=PATIENCE_MS)
    page.fill("#question", question.text)
    page.fill("#below", "0.9")
    page.click("#send")
    for side in ("full", "pruned"):
        expect(page.locator(f"#time-{side}")).to_contain_text("first token after", timeout=PATIENCE_MS)
        expect(page.locator(f"#answer-{side}")).to_contain_text(question.answer)
    said = rf"^Answer with 64 tokens: {question.answer}\. Confidence 0\.9[0-9]+, at least 0\.9: not asked again\.$"
    expect(page.locator("#sureness")).to_have_text(re.compile(said), timeout=PATIENCE_MS)
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / "inspector.png", full_page=True)
    page.close()


def test_the_page_says_what_is_wrong_in_a_sentence(visit: Visit, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page, error = visit.opened(), visit.page.locator("#error")
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo_path("coffee").read_bytes()[:200])
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG" + bytes(40 * 2**20))
    for file, said in ((text, "not an image"), (broken, "not an image"), (huge, "40 MB")):
        page.set_input_files("#file", file)
        expect(error).to_contain_text(said)
        expect(error).to_contain_text(file.name)
    many = [tmp_path / f"{i}.jpg" for i in range(300)]
    for file in many:
        file.write_bytes(photo_path("rocket").read_bytes())
    _drop(page, 300)
    expect(error).to_contain_text("One image at a time, please: these are 300.")
    page.locator("#samples button").first.click()
    expect(page.locator("rect.cell")).to_have_count(576, timeout=PATIENCE_MS)
    expect(error).to_be_hidden()
    assert httpx.get(f"{visit.server.url}/health").status_code == 200


def _drop(page: Any, files: int) -> None:
    page.evaluate(
        """count => {
          const data = new DataTransfer();
          for (let i = 0; i < count; i++) data.items.add(new File(["x"], `${i}.jpg`, {type: "image/jpeg"}));
          document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        files,
    )


def test_the_page_has_no_other_files(server: Server) -> None:
    assert httpx.get(f"{server.url}/promprune").headers["content-security-policy"].startswith("default-src 'none'")
    for path in ("static/nothing.js", "static/..%2f..%2fpage.py", "samples/README.md", "samples/..%2fmodel.py"):
        assert httpx.get(f"{server.url}/promprune/{path}").status_code == 404

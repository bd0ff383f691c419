"""The dashboards drawn from a real Prometheus, which watches a real server that gets images and videos."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from deploy.draw_dashboards.__main__ import panels_of
from deploy.draw_dashboards.queries import Prometheus, filled
from promprune_vllm.demo.families import build_family_model
from tests.clips import Clip
from tests.deploy.watching import DASHBOARDS, ROOT, dashboard, prometheus, tool
from tests.server.conftest import _serving, post
from tests.server.requests_with_videos import BUDGET, CHAT, asked, photo, video

pytestmark = [pytest.mark.server, pytest.mark.release]
ROW = "Videos"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    tool("prometheus")  # before the server is started in vain
    directory = tmp_path_factory.mktemp("drawn")
    model = build_family_model("qwen2_5_vl", directory / "model")
    for server in _serving(model, directory, "--visual-token-allow-methods", "evs"):
        with prometheus(directory, server.url) as address:
            started = time.time()
            for frames in range(4, 12):
                clip = video(Clip(frames).mp4_url())
                for parts, fields in (
                    ((clip, photo()), {BUDGET: 6}),
                    ((clip,), {BUDGET: "50%", "visual_token_method": "evs"}),
                    ((clip, photo()), {}),
                ):
                    assert post(server, CHAT, asked(*parts, **fields)).status_code == 200
                time.sleep(1)
            time.sleep(2)  # two more scrapes
            yield Prometheus(address, started, time.time())


def test_the_row_of_videos_has_data(watched: Prometheus) -> None:
    (document,) = [each for each in map(dashboard, DASHBOARDS) if each["uid"] == "promprune-overview"]
    values = watched.variables(document)
    panels = [panel for panel in panels_of(document, ROW) if panel["type"] != "row"]
    assert len(panels) > 2
    for panel in panels:
        for target in panel["targets"]:
            found = watched.over_time(filled(target["expr"], values))
            assert any(value > 0 for line in found for value in line.points.values()), target["expr"]


def test_the_dashboards_are_drawn(watched: Prometheus, tmp_path: Path) -> None:
    def draw(*more: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "deploy.draw_dashboards",
            "--prometheus",
            watched.url,
            "--out",
            str(tmp_path),
        ]
        return subprocess.run(
            [*command, "--minutes", "2", *more], cwd=ROOT, capture_output=True, text=True, check=False
        )

    done = draw()
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {f"{path.stem}.png" for path in DASHBOARDS}
    heights = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            heights[path.name] = picture.height
            assert len(picture.convert("RGB").getcolors(10**6) or ()) > 20, "it is not blank"
    done = draw("--row", ROW)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "overview.png"))
    with Image.open(tmp_path / "overview.png") as picture:
        assert picture.height < heights["overview.png"] / 4


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.draw_dashboards", "--out", str(tmp_path), "--prometheus"]
    nobody = "http://127.0.0.1:9"
    done = subprocess.run([*command, nobody], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"No Prometheus answers at {nobody}" in done.stderr
    done = subprocess.run(
        [*command, nobody, "--row", "None"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no dashboard has a row 'None'" in done.stderr

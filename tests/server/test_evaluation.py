"""`promprune eval` against real servers: a small slice of the matrix, and lmms-eval on a task of our own."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from promprune_vllm.core.registry import methods
from promprune_vllm.demo.scenes import make_scene
from promprune_vllm.demo.server import Server
from promprune_vllm.evaluation.records import FILE, read
from tests import runner
from tests.conftest import VISUAL_TOKENS
from tests.server.conftest import MODEL

pytestmark = [pytest.mark.server, pytest.mark.release]
LMMS = Path(sys.prefix) / "lmms-only"  # `setup_env.py --lmms` fills it, and so does `make test-release`
TASK = Path(__file__).parents[1] / "lmms"


def evaluate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "promprune_vllm", "eval", *arguments],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
        env={**os.environ, **environment},
    )


def grown(server: Server, before: dict[str, float], name: str) -> float:
    return server.metrics("promprune")[name] - before[name]


def test_a_slice_of_the_matrix(every_method: Server, tmp_path: Path) -> None:
    before = every_method.metrics("promprune")
    slice_ = ("--methods", "promprune,random:2", "--budgets", "64,16", "--tasks", "presence,plate")
    arguments = ("--url", every_method.url, *slice_, "--questions", "4", "--out", str(tmp_path), "--json")
    result = evaluate(*arguments)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    cells = {(cell["method"], cell["budget"]): cell for cell in document["cells"]}
    asked = {key: {task: each["questions"] for task, each in cell["tasks"].items()} for key, cell in cells.items()}
    assert asked == {("full", "full"): {"presence": 4, "plate": 4}} | {
        (method, budget): {"presence": n, "plate": n}
        for method, n in (("promprune", 4), ("random", 2))
        for budget in ("64", "16")
    }
    answers = list(read(tmp_path / FILE).answers.values())
    assert len(answers) == 32
    for answer in answers:  # as usage.visual_tokens of every single reply says
        kept = VISUAL_TOKENS if answer.method == "full" else int(answer.budget)
        assert (answer.seen, answer.kept) == (VISUAL_TOKENS, kept)
        assert answer.confidence is not None
        assert 0 < answer.confidence <= 1
    curves = {(curve["method"], curve["budget"]): curve["points"] for curve in document["curves"]}
    assert curves.keys() == cells.keys() - {("full", "full")}
    assert [points[0]["tokens"] for points in curves.values()] == [int(budget) for _, budget in curves]
    assert grown(every_method, before, "promprune_visual_tokens_seen_total") == 32 * VISUAL_TOKENS
    assert grown(every_method, before, "promprune_visual_tokens_kept_total") == 8 * VISUAL_TOKENS + 12 * (64 + 16)
    assert (tmp_path / "accuracy-budget.png").stat().st_size > 10_000
    assert (tmp_path / "asking-again.png").stat().st_size > 10_000
    again = evaluate(*arguments)
    assert again.returncode == 0, again.stderr
    assert "32 of them answered before" in again.stderr
    assert json.loads(again.stdout)["cells"] == document["cells"]
    assert grown(every_method, before, "promprune_visual_tokens_seen_total") == 32 * VISUAL_TOKENS


def test_every_method_answers(every_method: Server, tmp_path: Path) -> None:
    options = ("--budgets", "10%", "--tasks", "count", "--questions", "1", "--no-plots", "--out", str(tmp_path))
    result = evaluate("--url", every_method.url, *options)
    assert result.returncode == 0, result.stderr
    kept = {answer.method: answer.kept for answer in read(tmp_path / FILE).answers.values()}
    assert kept == {"full": VISUAL_TOKENS} | dict.fromkeys(methods(over_frames=False), 58)


def test_a_server_without_the_plugin_is_refused(stock: Server, tmp_path: Path) -> None:
    result = evaluate("--url", stock.url, "--out", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.strip().count("\n") == 0
    assert "serves without promprune-vllm: it has no /v1/visual_tokens" in result.stderr


def _task(folder: Path) -> None:
    """Put our task for lmms-eval into a folder, with the questions of a scene."""
    scene = make_scene("scattered", 0)
    content = io.BytesIO()
    scene.image().save(content, "PNG")
    image = base64.b64encode(content.getvalue()).decode()
    rows: list[dict[str, Any]] = [
        {"image": image, "question": each.text, "answer": each.answer} for each in scene.questions()[:3]
    ]
    folder.mkdir()
    scenes = folder / "scenes.jsonl"
    scenes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scenes.py").write_text((TASK / "scenes.py").read_text())
    written = (TASK / "promprune_scenes.yaml").read_text().replace("SCENES_FILE", str(scenes))
    (folder / "promprune_scenes.yaml").write_text(written)


@pytest.mark.timeout(900)  # lmms-eval is run twice, and indexes some thousand tasks each time
@pytest.mark.skipif(not LMMS.is_dir(), reason="no lmms-eval: python deploy/environment/setup_env.py --lmms")
def test_lmms_eval_asks_at_the_budget_it_is_told(every_method: Server, tmp_path: Path) -> None:
    _task(tmp_path / "task")
    before = every_method.metrics("promprune")
    result = evaluate(
        *("--url", every_method.url, "--model", MODEL, "--out", str(tmp_path / "out"), "--json"),
        *("--lmms", "promprune_scenes", "--methods", "random", "--budgets", "32"),
        *("--lmms-command", f"{sys.executable} -m lmms_eval"),
        *("--lmms-args", f"--include_path {tmp_path / 'task'}"),
        PYTHONPATH=runner.python_path(LMMS),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HOME=str(tmp_path / "hf"),
    )
    assert result.returncode == 0, result.stderr
    full, pruned = json.loads(result.stdout)["rows"]
    assert (full["method"], full["requests"], full["kept_share"]) == ("full", 3, 1)
    assert (pruned["method"], pruned["requests"], pruned["kept_share"]) == ("random", 3, round(32 / 576, 4))
    assert 0 <= pruned["scores"]["promprune_scenes"] <= 1
    assert grown(every_method, before, "promprune_visual_tokens_kept_total") == 3 * (VISUAL_TOKENS + 32)
    assert "| `random` | 32 |" in (tmp_path / "out" / "lmms.md").read_text()

"""``promprune bench gpu`` rehearsed on a CPU: every stage really runs, with a small shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from promprune_vllm.bench.gpu import text
from promprune_vllm.bench.gpu.figures import figures
from promprune_vllm.bench.gpu.report import MARKDOWN, read

pytestmark = [pytest.mark.server, pytest.mark.release]  # a minute; units of it are tested without an engine


@pytest.mark.timeout(1000)
def test_a_rehearsal_measures_every_stage(tmp_path: Path) -> None:
    out, minutes = tmp_path / "gpu", 15
    words = ("bench", "gpu", "--out", str(out), "--device", "cpu", "--shape", "tiny", "--minutes", str(minutes))
    done = subprocess.run(
        [sys.executable, "-m", "promprune_vllm", *words], capture_output=True, text=True, check=False
    )
    document = read(out)
    states = {each["name"]: (each["state"], each.get("why")) for each in document["stages"]}
    assert states == dict.fromkeys(
        ("environment", "tests", "kernels 60x80:9", "prefill tiny", "vllm"), ("done", None)
    )
    assert done.returncode == 0, done.stderr
    assert document["ended"]
    assert document["seconds"] < 60 * minutes
    assert (out / MARKDOWN).read_text() == text.markdown(document) == done.stdout.rstrip("\n") + "\n"
    found = figures(document)
    assert found["tests"]["tests"]["passed"] == 1
    assert set(found["kernels"]) == {"60x80:9"}
    assert set(found["prefill"]) == {"tiny"}
    _check_served(list(found["vllm"].values()))


def _check_served(rows: list[dict[str, object]]) -> None:
    assert [(row["concurrency"], row["budget"]) for row in rows] == [(1, "full"), (1, 64), (4, "full"), (4, 64)]
    for row in rows:
        assert (row["completed"], row["failed"]) == (row["requests"], 0)
        assert row["kept_share"] == (1 if row["budget"] == "full" else round(64 / 144, 4))
        assert (row["cuda_graphs"], row["block_tokens"]) == (False, 32)
        assert row["model_runner"] in ("V1", "V2")
        most = float(str(row["kv_blocks_max"]))  # whole blocks; 0 if a load was over before the first look
        assert most == pytest.approx(round(most), abs=0.1)
        assert row["kv_blocks_mean"] == pytest.approx(most, abs=most)

"""Driving lmms-eval, with a stand-in that asks two questions and writes results as it does."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation import lmms
from promprune_vllm.evaluation.proxy import proxy
from promprune_vllm.evaluation.sender import Way
from promprune_vllm.evaluation.target import find_target
from tests.unit.evaluated import reply, server

STAND_IN = """
import json, os, pathlib, sys, urllib.error, urllib.request
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
arguments = dict(pair.split("=", 1) for pair in words["--model_args"].split(","))
for question in ("one", "two"):
    body = {"model": arguments["model_version"], "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(arguments["base_url"] + "/chat/completions", json.dumps(body).encode())
    request.add_header("Authorization", "Bearer " + os.environ["OPENAI_API_KEY"])
    try:
        urllib.request.urlopen(request)
    except urllib.error.HTTPError:
        pass  # it scores a failed request as a wrong answer, and ends well
out = pathlib.Path(words["--output_path"]) / "demo"
out.mkdir(parents=True)
results = {"pope": {"alias": "pope", "pope_accuracy,none": 0.9, "pope_f1_score,none": 0.855,
                    "pope_f1_score_stderr,none": 0.01},
           "mme": {"mme_perception_score,none": 1500.5, "mme_cognition_score,none": 361.0}}
(out / "20260101_results.json").write_text(json.dumps({"results": results}))
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return shlex.join([sys.executable, str(script)])


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


def test_every_way_is_one_run_through_a_forwarder_that_adds_the_fields(tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"
    options = ("--methods", "promprune", "--budgets", "64", "--lmms-command", command, "--out", str(out), "--json")
    with server() as (url, got):
        result = invoke("--url", url, "--lmms", "pope,mme", *options)
    assert result.exit_code == 0, result.output
    asked = [(body.get("visual_token_method"), body["visual_token_budget"]) for body in got]
    assert asked == [(None, "full")] * 2 + [("promprune", 64)] * 2
    document = json.loads((out / "lmms.json").read_text())
    assert [(row["method"], row["budget"], row["requests"]) for row in document["rows"]] == [
        ("full", "full", 2),
        ("promprune", "64", 2),
    ]
    assert document["rows"][1]["scores"] == {"pope": 85.5, "mme": 1861.5}
    text = (out / "lmms.md").read_text()
    assert "| all tokens | full | 85.5 | 1862 | 100.0 | measured here |" in text
    assert "| promprune | 64 | - | - | 96.1 | the paper's, arXiv 2603.14892 |" in text


def test_a_failed_request_fails_the_run(tmp_path: Path, command: str) -> None:
    def refusing(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return reply(body) if body["visual_token_budget"] == "full" else (400, {"error": {"message": "too long"}})

    options = (
        "--methods",
        "promprune",
        "--budgets",
        "64",
        "--lmms-command",
        command,
        "--out",
        str(tmp_path / "o"),
    )
    with server(refusing) as (url, _):
        result = invoke("--url", url, "--lmms", "pope", *options)
    assert result.exit_code == 2
    assert "2 requests of lmms-eval with" in result.output
    assert "too long" in result.output


@pytest.mark.parametrize(
    ("command", "says"),
    [("/no/such/lmms-eval", "pip install lmms-eval"), (f"{sys.executable} -c exit(3)", "exited with status 3")],
)
def test_lmms_eval_that_is_not_there_or_fails_is_told(tmp_path: Path, command: str, says: str) -> None:
    with server() as (url, _):
        result = invoke("--url", url, "--lmms", "pope", "--lmms-command", command, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert says in result.output


def test_it_needs_a_server_with_the_plugin() -> None:
    assert "give its address with --url" in invoke("--lmms", "pope").output
    with server(state=None) as (url, _):
        assert "serves without promprune-vllm" in invoke("--url", url, "--lmms", "pope").output


def test_the_forwarder_keeps_the_servers_key_and_wants_its_own() -> None:
    with (
        server(api_key=None) as (url, got),
        proxy(find_target(url, api_key="secret"), {"visual_token_budget": 64}) as (address, key, tally),
    ):
        chat, body = f"{address}/v1/chat/completions", {"model": "demo", "messages": []}
        assert httpx.post(chat, json=body).status_code == 401
        assert not got
        answered = httpx.post(chat, json=body, headers={"Authorization": f"Bearer {key}"})
        assert answered.json()["usage"]["visual_tokens"]["kept"] == 64
        models = httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert models.json()["data"][0]["id"] == "demo"
    assert got == [{**body, "visual_token_budget": 64}]
    assert (tally.answered, tally.refused) == (1, 0)


def test_a_method_the_server_does_not_allow_is_refused(tmp_path: Path) -> None:
    run = lmms.Run(("true",), ("pope",), (), tmp_path, 1)
    with server() as (url, _), pytest.raises(EvaluationError, match="does not allow method 'fsr'"):
        lmms.drive(find_target(url), [Way.full(1), Way("fsr", 64, 1)], run, Console(quiet=True))


def test_without_figures_the_table_says_so_beside_the_papers() -> None:
    lines = lmms.table([]).splitlines()
    assert lines[0].startswith("|  | tokens | GQA | MMBench | MME | POPE (F1) | SQA | TextVQA | relative, %")
    ours = [line for line in lines if line.endswith("| ours |")]
    assert len(ours) == 2
    assert all(line.count("*not measured here*") == 7 for line in ours)
    theirs = [line for line in lines[2:] if line not in ours]
    assert all("the paper's, arXiv 2603." in line for line in theirs)


def test_an_unknown_task_is_read_by_its_first_metric() -> None:
    results = {"own": {"alias": "own", "exact_match,none": 0.25, "exact_match_stderr,none": 0.1}, "empty": {}}
    assert lmms.scores(results) == {"own": 0.25}

"""Driving lmms-eval, with a stand-in that asks two questions and writes results as it does."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from promprune_vllm.cli import app
from promprune_vllm.core.registry import get_method
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation import lmms
from promprune_vllm.evaluation.plan import parse_options, split_list
from promprune_vllm.evaluation.proxy import proxy
from promprune_vllm.evaluation.published import PUBLISHED
from promprune_vllm.evaluation.sender import Way
from promprune_vllm.evaluation.target import find_target
from tests.documents import BLOCK, ROOT
from tests.unit.evaluated import reply, server

LMMS_TASKS = Path(sys.prefix) / "lmms-only" / "lmms_eval" / "tasks"

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


def test_the_newest_figures_have_a_source_and_are_shares_of_all_tokens() -> None:
    for each in PUBLISHED:
        assert each.source
        assert all(len(means) == len(each.budgets) for means in each.means.values())
        assert all(mean is None or 0 < mean < each.full for means in each.means.values() for mean in means)
    line = next(line for line in lmms.published_table().splitlines() if "| EADP | 512 of 1,024" in line)
    assert "| 512 of 1,024: 86.7; 256: 80.9; 128: 74.4 |" in line  # 73.1, 68.2 and 62.7 of 84.3


def shown(program: str) -> list[list[str]]:
    """Commands about large models that docs/evaluation.md shows, as words."""
    codes = [code for *_, code in BLOCK.findall((ROOT / "docs" / "evaluation.md").read_text())]
    shell = [code.replace("\\\n", " ") for code in codes if "--lmms" in code or "promprune serve" in code]
    lines = [shlex.split(line) for code in shell for line in code.splitlines()]
    wanted = ["promprune", program]
    return [words for words in lines if words[:2] == wanted and (program == "serve" or "--lmms" in words)]


def test_every_model_has_a_server_and_a_command() -> None:
    assert [words[2].partition("/")[2] for words in shown("serve")] == [
        "llava-1.5-7b-hf",
        "Qwen2.5-VL-7B-Instruct",
        "Qwen3-VL-8B-Instruct",
        "Qwen3.8-27B",
    ]
    assert len(shown("eval")) == 4
    with_figures = {each.model for each in PUBLISHED}
    assert with_figures == {words[2] for words in shown("serve")[:3]}


@pytest.mark.parametrize(("serve", "words"), list(zip(shown("serve"), shown("eval"), strict=True)))
def test_the_documented_commands_are_valid(serve: list[str], words: list[str]) -> None:
    command = typer.main.get_command(app).commands["eval"]  # type: ignore[attr-defined]
    given = command.make_context("eval", words[2:]).params
    options = parse_options(
        *(given[name] for name in ("tasks", "budgets", "methods")), questions=1, concurrency=1, check=get_method
    )
    assert len(options.budgets) > 2
    allowed = serve[serve.index("--visual-token-allow-methods") + 1].split(",")
    assert {name for name, _ in options.methods} == {"promprune", *allowed}
    tasks = split_list(given["lmms"])
    assert len(set(tasks)) == len(tasks) > 7
    assert given["url"] == "http://127.0.0.1:8000"


@pytest.mark.skipif(not LMMS_TASKS.is_dir(), reason="no lmms-eval: python deploy/environment/setup_env.py --lmms")
def test_lmms_eval_has_the_documented_tasks() -> None:
    wanted = {task for words in shown("eval") for task in split_list(words[words.index("--lmms") + 1])}
    names = (
        re.findall(r"^task: *\"?([\w-]+)\"?", file.read_text(), re.MULTILINE)
        for file in LMMS_TASKS.rglob("*.yaml")
    )
    assert wanted - {name for found in names for name in found} == set()


def test_an_unknown_task_is_read_by_its_first_metric() -> None:
    results = {"own": {"alias": "own", "exact_match,none": 0.25, "exact_match_stderr,none": 0.1}, "empty": {}}
    assert lmms.scores(results) == {"own": 0.25}

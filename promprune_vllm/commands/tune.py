"""``promprune tune``: the options. Heavy modules are imported only when the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from promprune_vllm.commands.failures import fail, failing, resumable

if TYPE_CHECKING:
    from rich.console import Console

    from promprune_vllm.tuning.summary import Summary

BUDGETS = "50%,25%,12.5%,6.25%"
_URL = Annotated[str, typer.Option("--url", help="A running server with the plugin.")]
_KEY = Annotated[
    str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="API key of the server at --url, if any.")
]
_MODEL = Annotated[str | None, typer.Option("--model", help="Model name (default: the server's first).")]
_QUESTIONS = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        help='JSON lines: {"image": path, URL or a list of these, "question": text, and if known "answer": text}. '
        'Paths are relative to the file. An "id" names a line.',
        show_default=False,
    ),
]
_BUDGETS = Annotated[str, typer.Option("--budgets", help='Tokens, or shares such as "25%", comma-separated.')]
_METHODS = Annotated[
    str,
    typer.Option(
        "--methods",
        help="Methods to choose from, comma-separated; random and downsample are only compared with (default: the "
        "server's method, and both of these).",
    ),
]
_GOAL = Annotated[str, typer.Option("--goal", help="Share of the answers that must not change.")]
_OUT = Annotated[Path, typer.Option("--out", help="Folder for answers and the report; resumes what is there.")]
_FLIGHT = Annotated[int, typer.Option("--concurrency", min=1, max=256, help="Requests in flight.")]
_TOKENS = Annotated[int, typer.Option("--answer-tokens", min=1, help="Longest answer, in tokens.")]
_REPORT = Annotated[bool, typer.Option("--report-only", help="Ask nothing; report on the answers in --out.")]
_DEMO = Annotated[
    int | None,
    typer.Option(
        "--demo-questions",
        min=1,
        metavar="N",
        help="Ask nothing; write N questions about the demo's scenes to --out, to try this command with.",
        show_default=False,
    ),
]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the tables.")]


def tune(
    *,
    questions: _QUESTIONS = None,
    url: _URL = "http://127.0.0.1:8000",
    api_key: _KEY = None,
    model: _MODEL = None,
    budgets: _BUDGETS = BUDGETS,
    methods: _METHODS = "",
    goal: _GOAL = "95%",
    out: _OUT = Path("tune"),
    concurrency: _FLIGHT = 16,
    answer_tokens: _TOKENS = 64,
    report_only: _REPORT = False,
    demo_questions: _DEMO = None,
    as_json: _JSON = False,
) -> None:
    """Choose a budget on your own questions: what changes with fewer visual tokens, and what asking again mends.

    Asks each question with all tokens and at every budget, recommends the smallest number of
    tokens that was shown to leave the wanted share of the answers unchanged, and writes
    OUT/report.html. Each answer is a line of OUT/answers.jsonl; the same command resumes.
    """
    from rich.console import Console

    from promprune_vllm.evaluation.plan import parse_budgets, split_list
    from promprune_vllm.evaluation.target import find_target
    from promprune_vllm.tuning import demo_questions as demo
    from promprune_vllm.tuning import run
    from promprune_vllm.tuning.questions import load

    err = Console(stderr=True)
    with resumable(out), failing():
        if demo_questions is not None:
            file = demo.write(out, demo_questions)
            err.print(f"Wrote questions. Ask them with: promprune tune --questions {file}", highlight=False)
            return
        share, parsed, names = _share(goal), parse_budgets(budgets), tuple(split_list(methods))
        asked = load(_required(questions), out / run.IMAGES)
        if report_only:
            summary = run.write(out, asked, share)
        else:
            plan = run.Plan(asked, parsed, names, concurrency, answer_tokens, share)
            summary = run.tune(find_target(url, model, api_key), plan, out, err)
        _show(summary, out, err, as_json=as_json)


def _required(questions: Path | None) -> Path:
    if questions is None:
        fail("give a file with --questions, or write one: promprune tune --demo-questions 200 --out mine")
    return questions


def _share(text: str) -> float:
    percent = text.strip().endswith("%")
    try:
        share = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        fail(f"--goal must be a share of the answers above 0 and below 100%, such as 99% or 0.99; got {text!r}.")
    return share


def _show(summary: Summary, out: Path, err: Console, *, as_json: bool) -> None:
    from rich.console import Console

    from promprune_vllm.tuning import text
    from promprune_vllm.tuning.run import PAGE

    if as_json:
        typer.echo(json.dumps(summary.as_document(), indent=2))
    else:
        console = Console(width=None if Console().is_terminal else 130)
        for table in text.tables(summary):
            console.print(table)
        console.print(
            f"\n{text.recommendation(summary)}\n\n  {text.options(summary)}\n", highlight=False, markup=False
        )
        for note in text.reservations(summary):
            console.print(f"- {note}", highlight=False, markup=False)
    err.print(f"The report is {out / PAGE}: the curves, and the questions whose answers changed.", highlight=False)

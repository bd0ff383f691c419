"""``promprune tune``: asks what has no answer yet, audits, and writes the report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from promprune_vllm.bench.provenance import provenance
from promprune_vllm.core.escalation import WINDOW
from promprune_vllm.errors import EvaluationError
from promprune_vllm.evaluation.records import FILE, FULL_METHOD
from promprune_vllm.evaluation.report import CONTROLS
from promprune_vllm.evaluation.run import progress
from promprune_vllm.evaluation.sender import DOWNSAMPLE, Way
from promprune_vllm.evaluation.smaller import NoSuchSizeError, instead, pools, size_within, takes_any_size
from promprune_vllm.evaluation.target import Target
from promprune_vllm.tuning import pictures
from promprune_vllm.tuning.asking import FULL_WAY, Asked, AuditRefused, Changed, ask_all, audit_all
from promprune_vllm.tuning.page import page
from promprune_vllm.tuning.questions import Question, fingerprint
from promprune_vllm.tuning.records import Audit, Log, Said, read
from promprune_vllm.tuning.summary import Summary, summarize

RANDOM = "random"
PAGE = "report.html"
_LIMITS = ("min", "max", "low", "out_of_range")
_FEW = 8
"""Answers with all tokens after which empty ones end a run."""
IMAGES, OVERLAYS = "images", "overlays"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask.

    Args:
        questions: The operator's.
        budgets: At least one budget.
        methods: Methods to compare; empty for the server's own and the controls.
        concurrency: Requests in flight.
        answer_tokens: Longest answer, in tokens.
        goal: Wanted share of unchanged answers.
    """

    questions: tuple[Question, ...]
    budgets: tuple[int | float | str, ...]
    methods: tuple[str, ...]
    concurrency: int
    answer_tokens: int
    goal: float


def tune(target: Target, plan: Plan, out: Path, err: Console) -> Summary:
    """Ask what the folder has no answer to yet, and report on all of its answers.

    Args:
        target: Server to ask.
        plan: What to ask.
        out: Folder of the answers; an earlier run there is resumed.
        err: Console that shows the progress.

    Raises:
        EvaluationError: The server does not allow a method, refuses a request or goes away, or the folder's
            answers have other settings.
    """
    asked, notes = _ways(target, plan)
    if (refused := target.state["escalation"]["reason"]) is not None:
        notes.append(f"Asking again was left out: this server never answers again: {refused}.")
    options = {name: target.methods[name] for name in _selecting(target, plan)}
    settings = {
        "server": target.settings()["server"],
        "methods": options,
        "limits": {name: target.state["limits"][name] for name in _LIMITS},
        "questions": fingerprint(plan.questions),
        "answer_tokens": plan.answer_tokens,
        "confidence_tokens": WINDOW,
    }
    run = provenance() | {
        "default_method": target.state["method"]["name"],
        "escalation_refused": refused,
    }
    with Log(out / FILE, settings, run) as log:
        for note in notes:
            log.note(note)
        _ask(target, plan, asked, log, err)
        _audit(target, plan, asked, log, err)
        summary = summarize(read(out / FILE), plan.questions, plan.goal)
        if reason := pictures.draw(target, pictures.examples(summary, plan.questions), out / OVERLAYS, err):
            log.note(reason)
    return write(out, plan.questions, plan.goal)


def write(out: Path, questions: Sequence[Question], goal: float) -> Summary:
    """Compute the report on a folder's answers and write it next to them, as JSON and as a page.

    Args:
        out: Folder with a file of answers.
        questions: The questions that were asked.
        goal: Wanted share of unchanged answers.

    Raises:
        EvaluationError: There are no answers, or they are to other questions.
    """
    records = read(out / FILE)
    if records.settings.get("questions") != fingerprint(questions):
        raise EvaluationError(f"{out / FILE} has answers to other questions: set --questions or --out to match.")
    _require_answers(_full(records.said.values()), records.settings["answer_tokens"])
    summary = summarize(records, questions, goal)
    (out / "summary.json").write_text(json.dumps(summary.as_document(), indent=2) + "\n", encoding="utf-8")
    (out / PAGE).write_text(page(summary, questions, out / OVERLAYS), encoding="utf-8")
    return summary


def _selecting(target: Target, plan: Plan) -> tuple[str, ...]:
    """Return the methods that are compared, without those that only appear as controls."""
    default = target.state["method"]
    own = target.image_methods[0] if default.get("over_frames") else default["name"]
    names = tuple(name for name in plan.methods or (own,) if name not in CONTROLS)
    if not names:
        raise EvaluationError(
            f"There is no method to choose: {', '.join(plan.methods or (own,))} is only compared with. Name "
            f"another one with --methods; this server allows {', '.join(target.image_methods)}."
        )
    return names


def _ways(target: Target, plan: Plan) -> tuple[list[Asked], list[str]]:
    """Return how to ask each question, all tokens first, and what is not possible."""
    names, notes = [*_selecting(target, plan)], []
    names += [name for name in plan.methods if name in CONTROLS and name != DOWNSAMPLE]
    target.require(names)
    if not plan.methods:
        if RANDOM in target.image_methods:
            names.append(RANDOM)
        else:
            allowed = ",".join([*target.image_methods[1:], RANDOM])
            notes.append(
                "Nothing was compared with random tokens: this server does not allow method 'random'. Start it "
                f"with --visual-token-allow-methods {allowed}, and run the same command again."
            )
    asked = [Asked(FULL_WAY), *(Asked(Way(name, budget, 1)) for name in names for budget in plan.budgets)]
    if not plan.methods or DOWNSAMPLE in plan.methods:
        smaller, missing = _downsampled(target, plan)
        asked += smaller
        notes += missing
    return asked, notes


def _downsampled(target: Target, plan: Plan) -> tuple[list[Asked], list[str]]:
    """Return how to ask with smaller images: made by the client, or else by a method of the server."""
    sizes = dict.fromkeys(size for question in plan.questions for size in question.sizes)
    if not any(takes_any_size(target, size) for size in sizes):
        if pools(target):
            return [Asked(Way(DOWNSAMPLE, budget, 1)) for budget in plan.budgets], []
        return [], [
            "Plain down-sampling is not possible here: a smaller image has as many tokens on this model, and the "
            "server does not allow method 'downsample' (--visual-token-allow-methods)."
        ]
    asked, notes = [], []
    for way in (Way(DOWNSAMPLE, budget, 1) for budget in plan.budgets):
        try:
            asked.append(Asked(way, {size: size_within(target, way.budget, size) for size in sizes}))
        except NoSuchSizeError as error:
            notes.append(instead(target, way, error))
            if pools(target):
                asked.append(Asked(way))
    return asked, notes


def _ask(target: Target, plan: Plan, asked: Sequence[Asked], log: Log, err: Console) -> None:
    todo = [(each, way) for each in plan.questions for way in asked if way.key(each) not in log.said]
    total = len(plan.questions) * len(asked)
    earlier = f", {total - len(todo)} of them answered before" if len(todo) < total else ""
    what = f"{len(plan.questions)} questions in {len(asked)} ways: {total} answers{earlier}"
    err.print(f"{what}; they go to {log.file}", highlight=False)
    if todo:
        with progress(err, len(todo)) as advance:

            def keep(answer: Said) -> None:
                log.add(answer)
                advance()
                if answer.method == FULL_METHOD and len(full := _full(log.said.values())) == _FEW:
                    _require_answers(full, plan.answer_tokens)

            ask_all(target, iter(todo), plan.concurrency, plan.answer_tokens, keep)


def _full(said: Iterable[Said]) -> list[Said]:
    return [each for each in said if each.method == FULL_METHOD]


def _require_answers(full: Sequence[Said], answer_tokens: int) -> None:
    """Raise ``EvaluationError`` if most answers with all tokens are empty: empty ones would all be unchanged."""
    empty = sum(not each.text.strip() for each in full)
    if 2 * empty > len(full):
        raise EvaluationError(
            f"{empty} of {len(full)} answers with all tokens are empty, so there is nothing to compare. A model "
            f"that thinks before it answers may have spent all {answer_tokens} tokens on that: set a larger "
            "--answer-tokens, or turn thinking off in the server, such as with "
            """--default-chat-template-kwargs '{"enable_thinking": false}', and choose another --out."""
        )


def _audit(target: Target, plan: Plan, asked: Sequence[Asked], log: Log, err: Console) -> None:
    todo = list(_changed(plan, asked, log))
    if not todo:
        return
    with progress(err, len(todo), "auditing") as advance:

        def keep(audit: Audit) -> None:
            log.add(audit)
            advance()

        try:
            audit_all(target, iter(todo), plan.concurrency, keep)
        except AuditRefused as error:
            log.note(f"Changed answers were not audited. The server refused that: {error}")


def _changed(plan: Plan, asked: Sequence[Asked], log: Log) -> Iterator[Changed]:
    for question in plan.questions:
        full = log.said[Asked(FULL_WAY).key(question)]
        for way in asked:
            said = log.said[way.key(question)]
            if said.method != FULL_METHOD and said.key not in log.audits and said.text and not said.same_as(full):
                yield Changed(question, said, full.prompt_tokens)

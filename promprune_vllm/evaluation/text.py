"""Renders a report as Markdown, for the documentation, and as a table for the terminal."""

from __future__ import annotations

import math

from rich.table import Table

from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.report import ALL_TOKENS, BEST_SPLIT, CONTROLS, SUBJECT, Report
from promprune_vllm.evaluation.statistics import Comparison, Estimate
from promprune_vllm.markdown import table as markdown_table

_NOTE = (
    "± is one standard error, clustered by image. Methods may have been asked different numbers of questions (the "
    "first N of the same list): compare their difference to all tokens on the same questions. Differences "
    "are paired, in points, with the 95 % interval of a bootstrap over images; p is McNemar's exact test, which "
    "treats questions as independent. The best fixed split is selected by these same answers, which favors it."
)


def markdown(report: Report) -> str:
    """Return the whole report: macro accuracies, comparisons of PromPrune, and every task."""
    parts = ["### Macro accuracy, %", macro_table(report)]
    if any(report.against(method) for method in report.methods):
        parts += ["### Difference to all tokens on the same questions, points", lost_table(report)]
    if report.against(SUBJECT):
        parts += [f"### `{SUBJECT}` minus the others, points", pairs_table(report)]
    for budget in report.budgets:
        parts += [f"### Every task, budget {budget}", tasks_table(report, budget)]
    return "\n\n".join([*parts, _NOTE, provenance_line(report)]) + "\n"


def macro_table(report: Report) -> str:
    """Return macro accuracies, one row per method and one column per budget."""
    head = ["method", *report.budgets]
    return markdown_table(head, _macro_rows(report))


def lost_table(report: Report) -> str:
    """Return each method's paired difference to all tokens; comparable even if some were asked fewer questions."""
    rows = []
    for method in report.methods:
        lost = {pair.budget: pair.comparison for pair in report.against(method) if pair.against == ALL_TOKENS}
        questions = max((cell.macro.questions for cell in report.cells if cell.method == method), default=0)
        cells = [points(lost[budget].difference, "+.1f") if budget in lost else "-" for budget in report.budgets]
        rows.append([_named(method), f"{questions:,}", *cells])
    return markdown_table(["method", "questions", *report.budgets], rows)


def pairs_table(report: Report, method: str = SUBJECT) -> str:
    """Return one method's paired differences, one row per budget."""
    against = [*CONTROLS, BEST_SPLIT, ALL_TOKENS]
    rows = []
    for budget in report.budgets:
        pairs = {pair.against: pair for pair in report.against(method) if pair.budget == budget}
        cells = [
            _difference(pairs[name].comparison, pairs[name].other if name == BEST_SPLIT else "")
            if name in pairs
            else "-"
            for name in against
        ]
        rows.append([budget, *cells])
    return markdown_table(["budget", *against], rows)


def tasks_table(report: Report, budget: str) -> str:
    """Return the accuracies of every task at one budget, and with all tokens."""
    rows = []
    for method in (FULL_METHOD, *report.methods):
        cell = report.cell(method, None if method == FULL_METHOD else budget)
        if cell is not None:
            each = [points(cell.tasks[task]) if task in cell.tasks else "-" for task in report.tasks]
            rows.append([_named(method), *each, points(cell.macro)])
    return markdown_table(["method", *report.tasks, "macro"], rows)


def provenance_line(report: Report) -> str:
    """Describe the answers in one sentence: how many, of which versions, and the command."""
    settings, run = report.records.settings, report.records.runs[-1]
    answers = len(report.records.answers)
    images = len({answer.image for answer in report.records.answers.values()})
    versions = f"promprune-vllm {settings['server']['version']}, vLLM {settings['server']['vllm_version']}"
    return (
        f"{answers} answers about {images} images of split {settings['scenes']['split']}; {versions}; run on "
        f"{run['machine']}, {run['cores']} cores, commit {run['commit'] or 'unknown'}: `{run['command']}`."
    )


def terminal(report: Report) -> Table:
    """Return macro accuracies for the terminal."""
    table = Table(title="Macro accuracy, % ± standard error", title_justify="left")
    table.add_column("method")
    for budget in report.budgets:
        table.add_column(budget, justify="right")
    for row in _macro_rows(report):
        table.add_row(*(cell.strip("`") for cell in row))
    return table


def points(estimate: Estimate, form: str = ".1f") -> str:
    """Format an accuracy in percent, or a difference in points, with its standard error."""
    error = "" if math.isnan(estimate.error) else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.value + 0:{form}}{error}"


def _macro_rows(report: Report) -> list[list[str]]:
    rows = []
    full = report.cell(FULL_METHOD)
    if full is not None:
        rows.append(
            [_named(FULL_METHOD), *([points(full.macro)] + [""] * len(report.budgets))[: len(report.budgets)]]
        )
    for method in report.methods:
        cells = [report.cell(method, budget) for budget in report.budgets]
        rows.append([_named(method), *("-" if cell is None else points(cell.macro) for cell in cells)])
    return rows


def _named(method: str) -> str:
    return ALL_TOKENS if method == FULL_METHOD else f"`{method}`"


def _difference(comparison: Comparison, named: str) -> str:
    # Adding 0 turns a negative zero into a plain one.
    d, low, high = (
        round(100 * each, 1) + 0 for each in (comparison.difference.value, comparison.low, comparison.high)
    )
    p = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.2g}"
    interval = "" if math.isnan(low) else f" ({low:+.1f} … {high:+.1f})"
    return f"{d:+.1f}{interval}, {p}{named and f'; {named}'}"

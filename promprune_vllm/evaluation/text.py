"""Renders a report as Markdown, for the documentation, and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.table import Table

from promprune_vllm.core.escalation import WINDOW
from promprune_vllm.evaluation.cells import ALL_TOKENS, named, points
from promprune_vllm.evaluation.checks_text import checks_markdown
from promprune_vllm.evaluation.escalation import SHARES, Curve, Point
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.report import BEST_SPLIT, CONTROLS, SUBJECT, Cell, Report
from promprune_vllm.evaluation.sender import DOWNSAMPLE
from promprune_vllm.evaluation.statistics import Comparison
from promprune_vllm.markdown import table as markdown_table

NOTE = (
    "± is one standard error, clustered by image. Methods may have been asked different numbers of questions (the "
    "first N of the same list): compare their difference to all tokens on the same questions. Differences "
    "are paired, in points, with the 95% interval of a bootstrap over images; p is McNemar's exact test, which "
    "treats questions as independent. The best fixed split is selected by these same answers, which favors it."
)

_AGAIN_HEAD = ("first try", "asked again below", "asked again", "right, %", "minus all tokens", "tokens", "share")
_AGAIN_SHARE = 0.2
_AGAIN_NOTE = (
    "An answer is asked for again, with all tokens, if the smallest probability of a likeliest token among its "
    f"first {WINDOW} is below the threshold. Tokens are the mean per question, first tries that are thrown away "
    "included. Without sampling, the second answer is the one that was given with all tokens, so nothing was "
    "asked twice for these tables. A recommended threshold is the smallest that loses at most one standard "
    "error to all tokens; it is selected by these same answers, which favors it. A difference of +0.0 ± 0.0 means "
    "that the same questions are right, which more questions could refute."
)


def markdown(report: Report, *, checked: bool = True) -> str:
    """Return the whole report: macro accuracies, comparisons of PromPrune, every task, and the checks.

    Args:
        report: The figures.
        checked: Whether to include the checks.
    """
    parts = ["### Macro accuracy, %", macro_table(report)]
    if any(report.against(method) for method in report.methods):
        parts += ["### Difference to all tokens on the same questions, points", lost_table(report)]
    if report.against(SUBJECT):
        parts += [f"### `{SUBJECT}` minus the others, points", pairs_table(report)]
    if report.curves:
        parts += ["### Asking again", asking_again(report)]
    if report.checks and checked:
        parts += ["### What a mean hides", checks(report)]
    for budget in report.budgets:
        parts += [f"### Every task, budget {budget}", tasks_table(report, budget)]
    return "\n\n".join([*parts, NOTE, provenance_line(report)]) + "\n"


def macro_table(report: Report) -> str:
    """Return macro accuracies, one row per method and one column per budget."""
    head = ["method", *report.budgets]
    return markdown_table(head, _macro_rows(report))


def checks(report: Report) -> str:
    """Return each method's difference to ``downsample``, and all checks: invention, places, hard questions."""
    compared = [
        method for method in report.methods if any(p.against == DOWNSAMPLE for p in report.against(method))
    ]
    title = f"**Minus `{DOWNSAMPLE}` on the same questions, points**"
    tables = [title, lost_table(report, compared, DOWNSAMPLE)] if compared else []
    return "\n\n".join([*tables, checks_markdown(report)])


def lost_table(report: Report, methods: Sequence[str] = (), against: str = ALL_TOKENS) -> str:
    """Return each method's paired difference to another; comparable even if some were asked fewer questions.

    Args:
        report: The figures.
        methods: Methods to show, in this order; all by default.
        against: What to compare with, as in ``Pair``.
    """
    rows = []
    for method in methods or report.methods:
        lost = {pair.budget: pair.comparison for pair in report.against(method) if pair.against == against}
        questions = max((cell.macro.questions for cell in report.cells if cell.method == method), default=0)
        cells = [points(lost[budget].difference, "+.1f") if budget in lost else "-" for budget in report.budgets]
        rows.append([named(method), f"{questions:,}", *cells])
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


def asking_again(report: Report) -> str:
    """Return what asking again gives: for the first method by threshold and by task, then for every method."""
    method = report.methods[0]
    parts = [
        "\n".join(f"- {recommendation(curve)}" for curve in _curves(report, method)),
        again_table(report, method),
        f"By task, with `{method}` (in parentheses: asked again):",
        again_tasks_table(report, method),
        f"Every method, difference to all tokens in points if about {100 * _AGAIN_SHARE:.0f}% are asked again:",
        again_lost_table(report),
        "Every method, tokens spent at its recommended threshold (in parentheses), as a share of all tokens:",
        again_share_table(report),
        _AGAIN_NOTE,
    ]
    return "\n\n".join(parts)


def recommendation(curve: Curve) -> str:
    """Return the recommended threshold after one method and budget, and what it gives, in one sentence."""
    if curve.recommended is None:
        return f"{_start(curve)}: no threshold is within one standard error of all tokens and spends fewer."
    return what_it_gives(curve, curve.recommended)


def what_it_gives(curve: Curve, point: Point) -> str:
    """Return what a threshold gives after one method and budget, in one sentence."""
    full = point.right.value - point.difference.value
    again = f"ask again below {point.threshold}" if point.threshold else "never ask again"
    right = f"{100 * point.right.value:.1f} ± {100 * point.right.error:.1f}% right (all tokens {100 * full:.1f}%)"
    return f"{_start(curve)}, {again}: {right}, {100 * point.share:.0f}% of the tokens."


def _start(curve: Curve) -> str:
    return f"First try {curve.budget} with `{curve.method}`"


def again_table(report: Report, method: str) -> str:
    """Return a method's thresholds, from never asking again to asking 30% again, one block of rows per budget."""
    rows = []
    for each in _curves(report, method):
        some = {each.points[0], each.recommended, *(each.asking(share) for share in SHARES)}
        shown = sorted((point for point in some if point is not None), key=lambda point: point.threshold)
        rows += [_again_row(each, point) for point in shown]
    return markdown_table(_AGAIN_HEAD, rows)


def again_tasks_table(report: Report, method: str) -> str:
    """Return the accuracy of every task: with all tokens, of first tries, and at recommended thresholds."""
    rows = [["all tokens", "", *_task_cells(report, report.cell(FULL_METHOD))]]
    for each in _curves(report, method):
        rows.append([each.budget, "never", *_task_cells(report, report.cell(method, each.budget))])
        if each.recommended is not None and each.recommended.threshold:
            cells = [_again_task(each.tasks[task]) if task in each.tasks else "-" for task in report.tasks]
            rows.append([each.budget, _threshold(each.recommended), *cells])
    return markdown_table([*_AGAIN_HEAD[:2], *report.tasks], rows)


def again_lost_table(report: Report) -> str:
    """Return each method's paired difference to all tokens if a fifth is asked again; compare ``lost_table``."""

    def cell(curve: Curve) -> str:
        point = curve.asking(_AGAIN_SHARE)
        return "-" if point is None else f"{points(point.difference, '+.1f')} ({100 * point.again.value:.0f}%)"

    return _again_matrix(report, cell)


def again_share_table(report: Report) -> str:
    """Return the share of tokens at every recommended threshold, with the threshold."""

    def cell(curve: Curve) -> str:
        point = curve.recommended
        return "-" if point is None else f"{100 * point.share:.0f}% ({_threshold(point)})"

    return _again_matrix(report, cell)


def tasks_table(report: Report, budget: str) -> str:
    """Return the accuracies of every task at one budget, and with all tokens."""
    rows = []
    for method in (FULL_METHOD, *report.methods):
        cell = report.cell(method, None if method == FULL_METHOD else budget)
        if cell is not None:
            rows.append([named(method), *_task_cells(report, cell), points(cell.macro)])
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


def terminal_asking_again(report: Report) -> Table:
    """Return a method's recommended thresholds for the terminal."""
    method = report.methods[0]
    table = Table(title=f"Asking again with all tokens, first try with {method}", title_justify="left")
    for name in _AGAIN_HEAD:
        table.add_column(name, justify="right")
    for each in _curves(report, method):
        empty = [each.budget, *["-"] * (len(_AGAIN_HEAD) - 1)]
        table.add_row(*(empty if each.recommended is None else _again_row(each, each.recommended)))
    return table


def _macro_rows(report: Report) -> list[list[str]]:
    rows = []
    full = report.cell(FULL_METHOD)
    if full is not None:
        rows.append(
            [named(FULL_METHOD), *([points(full.macro)] + [""] * len(report.budgets))[: len(report.budgets)]]
        )
    for method in report.methods:
        cells = [report.cell(method, budget) for budget in report.budgets]
        rows.append([named(method), *("-" if cell is None else points(cell.macro) for cell in cells)])
    return rows


def _curves(report: Report, method: str) -> list[Curve]:
    curves = (report.curve(method, budget) for budget in report.budgets)
    return [each for each in curves if each is not None]


def _again_row(curve: Curve, point: Point) -> list[str]:
    spent = [f"{point.tokens:.0f}", f"{100 * point.share:.0f}%"]
    again = f"{100 * point.again.value:.1f}%"
    return [curve.budget, _threshold(point), again, points(point.right), points(point.difference, "+.1f"), *spent]


def _again_task(point: Point) -> str:
    return f"{points(point.right)} ({100 * point.again.value:.0f}%)"


def _again_matrix(report: Report, render: Callable[[Curve], str]) -> str:
    rows = []
    for method in report.methods:
        curves = [report.curve(method, budget) for budget in report.budgets]
        rows.append([named(method), *("-" if curve is None else render(curve) for curve in curves)])
    return markdown_table(["method", *report.budgets], rows)


def _task_cells(report: Report, cell: Cell | None) -> list[str]:
    return [points(cell.tasks[task]) if cell and task in cell.tasks else "-" for task in report.tasks]


def _threshold(point: Point) -> str:
    return str(point.threshold) if point.threshold else "never"


def _difference(comparison: Comparison, named: str) -> str:
    # Adding 0 turns a negative zero into a plain one.
    d, low, high = (
        round(100 * each, 1) + 0 for each in (comparison.difference.value, comparison.low, comparison.high)
    )
    p = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.2g}"
    interval = "" if math.isnan(low) else f" ({low:+.1f} … {high:+.1f})"
    return f"{d:+.1f}{interval}, {p}{named and f'; {named}'}"

"""Renders the checks of a report as Markdown."""

from __future__ import annotations

from promprune_vllm.evaluation.cells import named, points
from promprune_vllm.evaluation.checks import CHECKS, HARD
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.report import Report
from promprune_vllm.evaluation.sender import DOWNSAMPLE
from promprune_vllm.evaluation.statistics import Estimate
from promprune_vllm.markdown import table as markdown_table

_HARD_TITLE = f"Hard questions, which all tokens get right and `{DOWNSAMPLE}` gets wrong: right, % (questions)"
_NOTE = (
    "± is one standard error, clustered by image; 0.0 ± 0.0 is none, which more questions could refute. Half of "
    "the presence questions ask for what is not there; half of these for a shape and a color that are both there, "
    f"but not together. `{DOWNSAMPLE}` gets other questions wrong at every budget. A yes or no is right by chance "
    "as well, which `random` shows. Methods that were asked fewer questions have fewer of these."
)


def checks_markdown(report: Report) -> str:
    """Return a table of every check, and how methods do where ``downsample`` fails; empty without any."""
    tables = {check.title: _table(report, check.name) for check in CHECKS}
    tables[_HARD_TITLE] = _table(report, HARD)
    parts = [f"**{title}**\n\n{rows}" for title, rows in tables.items() if rows]
    return "\n\n".join([*parts, _pooled(report) + _NOTE]) if parts else ""


def _table(report: Report, check: str) -> str:
    """Return shares by method and budget, with the number of answers: in each cell if it depends on the budget."""
    shares = {(each.method, each.budget): each.share for each in report.checks if each.check == check}
    sizes = {(method, share.questions) for (method, _), share in shares.items()}
    numbers = len(sizes) > len({method for method, _ in sizes})
    rows = []
    for method in (FULL_METHOD, *report.methods):
        own = [share for (name, _), share in shares.items() if name == method]
        if method == FULL_METHOD:
            cells = [*(_cell(share, number=numbers) for share in own), *[""] * (len(report.budgets) - 1)]
        else:
            by_budget = (shares.get((method, budget)) for budget in report.budgets)
            cells = [_cell(share, number=numbers) for share in by_budget]
        if own:
            rows.append([named(method), *([] if numbers else [f"{own[0].questions:,}"]), *cells])
    head = ["method", *([] if numbers else ["questions"]), *report.budgets]
    return markdown_table(head, rows) if rows and report.budgets else ""


def _cell(share: Estimate | None, *, number: bool) -> str:
    if share is None:
        return "-"
    return points(share) + (f" ({share.questions})" if number else "")


def _pooled(report: Report) -> str:
    """Say which of the two ``downsample`` was, and how many tokens it kept."""
    cells = [cell for cell in report.cells if cell.method == DOWNSAMPLE]
    if not cells:
        return ""
    answers = [answer for answer in report.records.answers.values() if answer.method == DOWNSAMPLE]
    pooled = {answer.budget for answer in answers if answer.kept < answer.seen}
    if all(cell.budget in pooled for cell in cells):
        return f"`{DOWNSAMPLE}` is the server's method, which takes means of tokens. "
    kept = ", ".join(f"{cell.kept:g} at {cell.budget}" for cell in cells if cell.budget not in pooled)
    said = f"`{DOWNSAMPLE}` is an image that the client made smaller; its tokens: {kept}. "
    if not pooled:
        return said
    others = ", ".join(cell.budget for cell in cells if cell.budget in pooled)
    return f"{said}No image has so few at {others}; there it is the server's method, which takes means of tokens. "

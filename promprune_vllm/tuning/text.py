"""Says what was measured: the recommendation in sentences, and tables for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from promprune_vllm.evaluation.cells import points
from promprune_vllm.evaluation.records import FULL_METHOD
from promprune_vllm.evaluation.statistics import Estimate
from promprune_vllm.tuning.bounds import LEVEL, Interval
from promprune_vllm.tuning.summary import Cell, Row, Summary, as_good

HEAD = (
    *("method", "budget", "tokens", "unchanged, %"),
    *("right, %", "minus all tokens", "likeliest too, %", "nats lost per token"),
)
AGAIN_HEAD = ("asked again below", "asked again", "unchanged, %", "right, %", "tokens")
NOTE = (
    "Unchanged: the answer has the same text as with all tokens. Likeliest too: the answer's tokens that are the "
    "likeliest with all tokens as well; nats lost: how far the others are below the likeliest. Tokens: as a share "
    "of all visual tokens, second tries included. ± is one standard error, clustered by image."
)


def recommendation(summary: Summary) -> str:
    """Return what to do, in one sentence or two."""
    cell, goal = summary.chosen, f"{100 * summary.goal:g}"
    if cell is not None:
        return f"{_capital(_recommended(summary, cell))}: {gives(cell)}."
    advice = f"Keep all tokens: no budget was shown to leave {goal}% of the answers unchanged."
    if summary.best is None:
        return advice
    found = f"{advice} The best was {_recommended(summary, summary.best)}: {gives(summary.best)}."
    asked = max(row.questions for row in summary.rows)
    if asked < summary.needed:
        return (
            f"{found} {asked} questions cannot show {goal}%: that takes {summary.needed} with no changed answer."
        )
    return f"{found} Ask more questions, try larger budgets, or set a lower --goal."


def _recommended(summary: Summary, cell: Cell) -> str:
    """Return a cell in words, with its method if there was a choice."""
    several = len({row.method for row in summary.rows if not row.is_control}) > 1
    return f"method {cell.method}, {named(cell)}" if several else named(cell)


def named(cell: Cell) -> str:
    """Return a cell's budget and threshold in words."""
    again = f"ask again below {cell.threshold}" if cell.threshold else "never ask again"
    return f"budget {cell.budget}, {again}"


def gives(cell: Cell) -> str:
    """Return what a cell gives in words."""
    right = "" if cell.right is None else f", {points(cell.right)}% right"
    found = cell.unchanged
    interval = f"{_percent(found.value)}% ({_percent(found.low)} to {_percent(found.high)})"
    return f"{interval} of the answers unchanged at {cell.share:.2f} of the tokens{right}"


def reservations(summary: Summary) -> list[str]:
    """Return what an operator should know before using the recommendation."""
    said = [
        f"All intervals of methods hold together with a probability of {100 * LEVEL:.0f}%, so choosing among "
        f"{summary.choices} of them does not flatter the one chosen. They are about questions like these."
    ]
    if summary.cut_off:
        said.append(
            f"{_percent(summary.cut_off)}% of the answers were cut off at {_tokens(summary)} tokens "
            "(--answer-tokens): only their beginnings were compared."
        )
    full = [each for each in summary.records.said.values() if each.method == FULL_METHOD]
    if empty := sum(not each.text.strip() for each in full):
        said.append(f"{empty} of {len(full)} answers with all tokens are empty.")
    if capped := sum(each.kept < each.seen for each in full):
        said.append(
            f"The server's maximum (--visual-token-max) left out tokens of {capped} of {len(full)} answers with "
            "all tokens: what is said about those is about the maximum."
        )
    cell = summary.level
    for control, difference in summary.against.items():
        if cell is not None and as_good(difference):
            said.append(
                f"Look at {control!r}: at budget {cell.budget}, {cell.method!r} leaves only "
                f"{points(difference, '+.1f')} points more answers unchanged. Tokens selected with care may not "
                "be worth it here; a smaller budget may do."
            )
    return [*said, *summary.records.notes]


def _tokens(summary: Summary) -> object:
    return summary.records.settings.get("answer_tokens", "the most")


def options(summary: Summary) -> str:
    """Return the command that starts a server as recommended."""
    cell, words = summary.chosen, ["promprune serve MODEL"]
    if cell is not None:
        if cell.method != summary.records.run.get("default_method"):
            words.append(f"--visual-token-method {cell.method}")
        words.append(f"--visual-token-budget {cell.budget}")
        if cell.threshold:
            words.append(f"--visual-token-escalate {cell.threshold}")
    return " ".join(words)


def rows(summary: Summary) -> list[list[str]]:
    """Return the table: all tokens, then each method and budget without second tries."""
    full = ["all tokens", "", "100%", "100", "" if summary.full is None else points(summary.full), "", "100", "0"]
    return [full, *(_row(row) for row in summary.rows)]


def again_rows(row: Row) -> list[list[str]]:
    """Return a method and budget by threshold."""
    return [
        [
            str(cell.threshold) if cell.threshold else "never",
            f"{100 * cell.again:.1f}%",
            ranged(cell.unchanged),
            "" if cell.right is None else points(cell.right),
            share(cell),
        ]
        for cell in row.cells
    ]


def level_row(summary: Summary) -> Row | None:
    """Return the row of the recommended cell, or of the best if none is recommended."""
    cell = summary.level
    if cell is None:
        return None
    return next(row for row in summary.rows if (row.method, row.budget) == (cell.method, cell.budget))


def tables(summary: Summary) -> list[Table]:
    """Return the tables for the terminal."""
    made = [_table("By method and budget, never asked again", HEAD, rows(summary))]
    if (row := level_row(summary)) is not None and len(row.cells) > 1:
        title = f"Asking again with all tokens after {row.method} with budget {row.budget}"
        made.append(_table(title, AGAIN_HEAD, again_rows(row)))
    return made


def ranged(interval: Interval) -> str:
    """Format a share in percent with its interval."""
    return f"{_percent(interval.value)} ({_percent(interval.low)} to {_percent(interval.high)})"


def share(cell: Cell) -> str:
    """Format the tokens of a cell as a share of all."""
    return f"{100 * cell.share:.0f}%"


def _row(row: Row) -> list[str]:
    first = row.cells[0]
    unaudited = f" ({row.unaudited} not audited)" if row.unaudited and row.first is not None else ""
    return [
        row.method,
        row.budget,
        share(first),
        ranged(first.unchanged),
        _maybe(first.right),
        _maybe(row.difference, "+.1f"),
        "-" if row.first is None else f"{_percent(row.first)}{unaudited}",
        "-" if row.nats is None else f"{row.nats:.3f}",
    ]


def _maybe(estimate: Estimate | None, form: str = ".1f") -> str:
    return "" if estimate is None else points(estimate, form)


def _table(title: str, head: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    empty = [all(not row[place] for row in cells) for place in range(len(head))]  # no right answers are known
    for name, none in zip(head, empty, strict=True):
        if not none:
            table.add_column(name, justify="left" if name in ("method", "budget") else "right")
    for row in cells:
        table.add_row(*(cell for cell, none in zip(row, empty, strict=True) if not none))
    return table


def _percent(number: float) -> str:
    """Format in percent, never rounded up to 100 or down to 0."""
    if number in (0, 1):
        return f"{100 * number:.0f}"
    return f"{min(max(100 * number, 0.1), 99.9):.1f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

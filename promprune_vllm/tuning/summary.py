"""Computes the table, the curves and the recommendation from the answers to an operator's questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from promprune_vllm.evaluation.records import FULL_METHOD, is_right
from promprune_vllm.evaluation.report import CONTROLS
from promprune_vllm.evaluation.statistics import Estimate, Sums
from promprune_vllm.tuning.bounds import LEVEL, Interval, interval, needed
from promprune_vllm.tuning.questions import Question
from promprune_vllm.tuning.records import Audit, Records, Said

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
"""Fixed before anything is asked: thresholds taken from the answers would flatter. 0 never asks again."""
_ROUNDING = 1e-9
_CLEAR = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class Cell:
    """What a method, a budget and a threshold give.

    Args:
        method: Method of the first try.
        budget: Its budget.
        threshold: Answers with a lower confidence are asked for again with all tokens; 0 for none.
        again: Share of the answers that are.
        unchanged: Share of the answers that are the same as with all tokens.
        tokens: Mean number of visual tokens per question, over both tries.
        share: ``tokens`` as a share of the number with all tokens.
        right: Accuracy, if right answers are known.
    """

    method: str
    budget: str
    threshold: float
    again: float
    unchanged: Interval
    tokens: float
    share: float
    right: Estimate | None


@dataclass(frozen=True, slots=True)
class Row:
    """One method with one budget, before any second try.

    Args:
        method: The method.
        budget: The budget.
        questions: Questions that were answered.
        difference: Accuracy minus that of all tokens, paired, if right answers are known.
        first: Share of the answers' tokens that are the likeliest with all tokens too; ``None`` if not audited.
        nats: What a token of an answer lost on average: its log-probability with all tokens below the likeliest's.
        unaudited: Changed answers without an audit.
        cells: By ascending threshold, from 0.
    """

    method: str
    budget: str
    questions: int
    difference: Estimate | None
    first: float | None
    nats: float | None
    unaudited: int
    cells: tuple[Cell, ...]

    @property
    def is_control(self) -> bool:
        """Whether it is there to compare with, and never recommended."""
        return self.method in CONTROLS


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures.

    Args:
        rows: Methods before controls, by descending number of tokens.
        goal: Wanted share of unchanged answers.
        chosen: The cheapest cell whose interval is above the goal; ``None``: keep all tokens.
        best: The cell with the highest lower end, whatever the goal; ``None`` without answers.
        choices: Number of cells to choose from; their intervals hold together.
        needed: Questions about different images that could show the goal if no answer changed.
        full: Accuracy with all tokens, if right answers are known.
        full_tokens: Mean number of visual tokens with all of them.
        cut_off: Share of all answers that were cut off.
        against: At the chosen budget, share of unchanged answers minus that of each control, paired.
        records: What the figures are computed from.
    """

    rows: tuple[Row, ...]
    goal: float
    chosen: Cell | None
    best: Cell | None
    choices: int
    needed: int
    full: Estimate | None
    full_tokens: float
    cut_off: float
    against: Mapping[str, Estimate]
    records: Records = field(repr=False)

    @property
    def level(self) -> Cell | None:
        """The cell whose changed answers a report shows: the chosen one, else the best."""
        return self.chosen or self.best

    def as_document(self) -> dict[str, Any]:
        """Return everything except the answers, ready for JSON."""
        document = {name: getattr(self, name) for name in ("goal", "choices", "needed", "full_tokens", "cut_off")}
        return {
            "settings": dict(self.records.settings),
            "run": dict(self.records.run),
            "notes": list(self.records.notes),
            "level": LEVEL,
            **document,
            "full": self.full and asdict(self.full),
            "rows": [asdict(row) for row in self.rows],
            "recommendation": self.chosen and asdict(self.chosen),
            "best": self.best and asdict(self.best),
            "against": {name: asdict(each) for name, each in self.against.items()},
        }


@dataclass(frozen=True, slots=True)
class _Pair:
    """A question with its answer at all tokens and one with fewer."""

    question: Question
    full: Said
    said: Said
    audit: Audit | None

    @property
    def same(self) -> bool:
        return self.said.same_as(self.full)

    def right(self, threshold: float = 0) -> bool:
        given = self.full if self.said.confidence < threshold else self.said
        return is_right(given.text, self.question.answer or "")


def summarize(records: Records, questions: Sequence[Question], goal: float) -> Summary:
    """Compute every figure from the answers.

    Args:
        records: The answers.
        questions: The questions.
        goal: Wanted share of unchanged answers, above 0 and below 1.
    """
    pairs = _paired(records, questions)
    thresholds = THRESHOLDS if records.run.get("escalation_refused") is None else THRESHOLDS[:1]
    choices = len(thresholds) * sum(method not in CONTROLS for method, _ in pairs)
    error = (1 - LEVEL) / max(choices, 1)
    rows = [_row(*way, each, thresholds, error) for way, each in pairs.items()]
    rows.sort(key=lambda row: (row.is_control, -row.cells[0].tokens, row.method))
    cells = [cell for row in rows if not row.is_control for cell in row.cells if cell.share < 1 - _ROUNDING]
    good = [cell for cell in cells if cell.unchanged.low >= goal - _ROUNDING]
    chosen = min(good, key=lambda cell: (cell.share, -cell.unchanged.low), default=None)
    best = max(cells, key=lambda cell: (cell.unchanged.low, -cell.share), default=None)
    fulls = [(each, records.said[key]) for each in questions if (key := _full_key(each)) in records.said]
    shown = chosen or best
    return Summary(
        tuple(rows),
        goal,
        chosen,
        best,
        choices,
        needed(goal, error),
        _accuracy([(q, is_right(said.text, q.answer or "")) for q, said in fulls]),
        sum(said.kept for _, said in fulls) / max(len(fulls), 1),
        sum(said.cut_off for said in records.said.values()) / max(len(records.said), 1),
        {} if shown is None else _against(shown, pairs),
        records,
    )


def _paired(records: Records, questions: Sequence[Question]) -> dict[tuple[str, str], list[_Pair]]:
    pairs: dict[tuple[str, str], list[_Pair]] = {}
    by_id = {question.id: question for question in questions}
    for key, said in records.said.items():
        question = by_id[said.question]
        full = records.said.get(_full_key(question))
        if full is not None and said.method != FULL_METHOD:
            pair = _Pair(question, full, said, records.audits.get(key))
            pairs.setdefault((said.method, said.budget), []).append(pair)
    return pairs


def _full_key(question: Question) -> tuple[str, str, str]:
    return (question.id, FULL_METHOD, FULL_METHOD)


def _row(method: str, budget: str, pairs: Sequence[_Pair], thresholds: Sequence[float], error: float) -> Row:
    told = [(pair.question, float(pair.right()) - _full_right(pair)) for pair in pairs]
    audited = [pair for pair in pairs if pair.same or (pair.audit is not None and pair.audit.tokens)]
    tokens = sum(pair.said.tokens if pair.same else _of(pair).tokens for pair in audited)
    first = sum(pair.said.tokens if pair.same else _of(pair).first for pair in audited)
    nats = sum(0.0 if pair.same else _of(pair).nats for pair in audited)
    refused = len(audited) < len(pairs) and not any(pair.audit for pair in pairs)
    return Row(
        method,
        budget,
        len(pairs),
        _accuracy(told),
        None if refused or not tokens else first / tokens,
        None if refused or not tokens else nats / tokens,
        len(pairs) - len(audited),
        tuple(_cell(method, budget, pairs, threshold, error) for threshold in thresholds),
    )


def _of(pair: _Pair) -> Audit:
    assert pair.audit is not None
    return pair.audit


def _cell(method: str, budget: str, pairs: Sequence[_Pair], threshold: float, error: float) -> Cell:
    again = [pair.said.confidence < threshold for pair in pairs]
    tokens = sum(p.said.kept + retried * p.full.kept for p, retried in zip(pairs, again, strict=True)) / len(pairs)
    agreed = [retried or pair.same for pair, retried in zip(pairs, again, strict=True)]
    return Cell(
        method,
        budget,
        threshold,
        sum(again) / len(pairs),
        interval(agreed, [pair.question.cluster for pair in pairs], error),
        tokens,
        tokens * len(pairs) / sum(pair.full.kept for pair in pairs),
        _accuracy([(pair.question, pair.right(threshold)) for pair in pairs]),
    )


def _full_right(pair: _Pair) -> float:
    return float(is_right(pair.full.text, pair.question.answer or ""))


def _accuracy(scores: Sequence[tuple[Question, float]]) -> Estimate | None:
    """Return a mean over the questions that have a right answer, with its clustered error."""
    known = [(question, score) for question, score in scores if question.answer is not None]
    return _mean(known) if known else None


def _mean(scores: Sequence[tuple[Question, float]]) -> Estimate:
    clusters = [question.cluster for question, _ in scores]
    sums = Sums.of([score for _, score in scores], clusters, ["all"] * len(scores), {"all": 1.0})
    return sums.estimate()


def _against(cell: Cell, pairs: Mapping[tuple[str, str], Sequence[_Pair]]) -> dict[str, Estimate]:
    """Compare first tries of a cell with those of the controls at the same budget."""
    own = {pair.question.id: pair.same for pair in pairs[cell.method, cell.budget]}
    found = {}
    for control in CONTROLS:
        both = [pair for pair in pairs.get((control, cell.budget), ()) if pair.question.id in own]
        if both:
            found[control] = _mean([(p.question, float(own[p.question.id]) - float(p.same)) for p in both])
    return found


def as_good(difference: Estimate) -> bool:
    """Return whether a method's difference to a control cannot be told from none, or is below it."""
    return not difference.value > _CLEAR * difference.error

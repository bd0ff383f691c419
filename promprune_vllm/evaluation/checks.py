"""Where a method can fail behind a good mean: what is not there, where things are, what low resolution cannot do.

* **Invention**, as POPE and CHAIR measure it (arXiv 2305.10355, 1809.02156): of objects that are not in the image,
  how many the model says are there, apart from those that are there and missed; and of all it says are there, how
  many are not. The demo model cannot describe an image: questions about single objects stand for a description.
* **Places**: what quarter an object is in, and on which side of another.
* **Hard questions**, the filter of VTC-Bench (arXiv 2510.07143): right with all tokens, and wrong with
  ``downsample`` at the same budget. On other questions a lower resolution would do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from promprune_vllm.evaluation.records import FULL_METHOD, Answer, is_right
from promprune_vllm.evaluation.sender import DOWNSAMPLE
from promprune_vllm.evaluation.statistics import Estimate, Sums

HARD = "hard"


@dataclass(frozen=True, slots=True)
class Check:
    """A share of answers.

    Args:
        name: Its name in ``summary.json``.
        title: What it is the share of.
        tasks: Tasks whose answers it is about; each counts the same.
        among: Which of these answers it is a share of.
        counted: Which of them are counted.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    among: Callable[[Answer], bool]
    counted: Callable[[Answer], bool]

    def estimate(self, answers: Sequence[Answer]) -> Estimate | None:
        """Return the share with its standard error clustered by image; ``None`` if there are no such answers."""
        some = [answer for answer in answers if answer.task in self.tasks and self.among(answer)]
        return _share(some, [self.counted(answer) for answer in some], [answer.task for answer in some])


@dataclass(frozen=True, slots=True)
class Checked:
    """The share of one check for one method with one budget.

    Args:
        check: Name of the check, or ``hard`` for the accuracy on hard questions.
        method: Method, or ``full`` if every token was kept.
        budget: Budget of the requests.
        share: The share.
    """

    check: str
    method: str
    budget: str
    share: Estimate


def _yes(answer: Answer) -> bool:
    return is_right(answer.said, "yes")


def _number(answer: Answer) -> int:
    """Return how many more the model has counted than there are; 0 if it has not said a number."""
    said = answer.said.strip()
    return int(said) - int(answer.expected) if said.isdecimal() else 0


def _all(_: Answer) -> bool:
    return True


CHECKS = (
    Check(
        "invented",
        "Invented: objects that are not there and that the model says are there, % of those not there",
        ("presence",),
        lambda answer: answer.expected == "no",
        _yes,
    ),
    Check(
        "missed",
        "Missed: objects that are there and that the model does not say are there, % of those there",
        ("presence",),
        lambda answer: answer.expected == "yes",
        lambda answer: not _yes(answer),
    ),
    Check(
        "untrue",
        "Untrue: objects that are not there, % of those that the model says are there (their number)",
        ("presence",),
        _yes,
        lambda answer: answer.expected == "no",
    ),
    Check("too-many", "Counted too many, % of counts", ("count",), _all, lambda answer: _number(answer) > 0),
    Check("too-few", "Counted too few, % of counts", ("count",), _all, lambda answer: _number(answer) < 0),
    Check("places", "Places right, %", ("where", "relation"), _all, lambda answer: answer.correct),
)


def check_all(groups: Mapping[tuple[str, str], Sequence[Answer]]) -> Iterator[Checked]:
    """Yield every check of every method and budget that has answers for it.

    Args:
        groups: Answers by method and budget.
    """
    full = next((answers for (method, _), answers in groups.items() if method == FULL_METHOD), ())
    right = {answer.asked for answer in full if answer.correct}
    for (method, budget), answers in groups.items():
        for check in CHECKS:
            if (share := check.estimate(answers)) is not None:
                yield Checked(check.name, method, budget, share)
        hard = right & {answer.asked for answer in groups.get((DOWNSAMPLE, budget), ()) if not answer.correct}
        some = [answer for answer in answers if answer.asked in hard]
        share = _share(some, [answer.correct for answer in some])
        if share is not None and method not in (FULL_METHOD, DOWNSAMPLE):  # right, and wrong, by definition
            yield Checked(HARD, method, budget, share)


def _share(answers: Sequence[Answer], counted: Sequence[bool], tasks: Sequence[str] = ()) -> Estimate | None:
    if not answers:
        return None
    tasks = tasks or [""] * len(answers)  # without tasks, every answer counts the same
    images = [answer.image for answer in answers]
    return Sums.of([float(each) for each in counted], images, tasks, dict.fromkeys(tasks, 1.0)).estimate()

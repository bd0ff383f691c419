"""The benchmarks of the papers as lmms-eval names them, and the figures the papers report. Nothing here is ours.

The figures are for LLaVA-1.5-7B, as far as we have them; ``relative`` averages over each paper's own benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A column of the papers' tables.

    Args:
        task: Its name in lmms-eval.
        title: Its name in the papers.
        metrics: Added up; what lmms-eval calls them.
        scale: Times this is what the papers print.
    """

    task: str
    title: str
    metrics: tuple[str, ...]
    scale: float = 1.0


BENCHMARKS = (
    Benchmark("gqa", "GQA", ("exact_match",), 100),
    Benchmark("mmbench_en_dev", "MMBench", ("gpt_eval_score",)),
    Benchmark("mme", "MME", ("mme_perception_score", "mme_cognition_score")),
    Benchmark("pope", "POPE (F1)", ("pope_f1_score",), 100),
    Benchmark("scienceqa_img", "SQA", ("exact_match",), 100),
    Benchmark("textvqa_val", "TextVQA", ("exact_match",), 100),
)


@dataclass(frozen=True, slots=True)
class Reported:
    """A row of a paper about LLaVA-1.5-7B.

    Args:
        method: As we call it, or in words.
        tokens: Kept of 576.
        source: Whose figures these are.
        relative: Per cent of the unpruned model's, averaged over that paper's own benchmarks.
        scores: By task, where we know them.
    """

    method: str
    tokens: int
    source: str
    relative: float
    scores: Mapping[str, float] = field(default_factory=dict)


_PROMPRUNE, _PRUNESID = "arXiv 2603.14892", "arXiv 2603.09480"
REPORTED = (
    Reported(
        "all tokens",
        576,
        _PRUNESID,
        100.0,
        {
            "gqa": 61.9,
            "mmbench_en_dev": 64.7,
            "mme": 1862,
            "pope": 85.9,
            "scienceqa_img": 69.5,
            "textvqa_val": 58.2,
        },
    ),
    Reported("promprune", 64, _PROMPRUNE, 96.1),
    Reported("promprune with a fixed split", 64, _PROMPRUNE, 93.6),
    Reported("divprune", 64, _PRUNESID, 94.6, {"mme": 1638, "pope": 85.6}),
    Reported("visionzip", 64, _PRUNESID, 94.0, {"gqa": 55.1, "mme": 1690, "pope": 77.0, "scienceqa_img": 69.0}),
    Reported("prunesid", 64, _PRUNESID, 95.9, {"mme": 1733, "pope": 83.8}),
)

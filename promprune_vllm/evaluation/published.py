"""The papers' benchmarks by their lmms-eval names, and the figures that the papers report. None are ours.

The figures are for LLaVA-1.5-7B, where we have them; ``relative`` averages over each paper's own benchmarks.
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
        metrics: lmms-eval metrics that are added up.
        scale: Factor from lmms-eval's figure to the papers'.
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
        method: Our name of the method, or a description.
        tokens: Tokens kept of 576.
        source: Paper that reports the figures.
        relative: Percentage of the unpruned model's score, averaged over that paper's own benchmarks.
        scores: Scores by task, where we have them.
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

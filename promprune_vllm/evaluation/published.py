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


@dataclass(frozen=True, slots=True)
class Published:
    """A table of a paper: means over its own benchmarks, of several methods.

    Args:
        model: Name of the model on the hub.
        source: Paper that reports the figures.
        benchmarks: What the means are over.
        full: The mean with all tokens; figures are shown as a percentage of it.
        budgets: Tokens kept, or their share.
        means: Mean by method, one for each budget; ``None`` where the paper has none.
    """

    model: str
    source: str
    benchmarks: str
    full: float
    budgets: tuple[str, ...]
    means: Mapping[str, tuple[float | None, ...]]


_CEN = "Centering before Pruning (Wen, Lee, Choi, Inha University, 2026)"  # Cen-Prune; we know no arXiv number
_EADP = "Combating Textual Noise and Redundancy (ECCV 2026, SJTU-DeepVisionLab/EADP)"
_EADP_QWEN = "TextVQA, ChartQA, AI2D, OCRBench, HallusionBench, MME, MMBench, MMBench-CN"
PUBLISHED = (
    Published(
        "llava-hf/llava-1.5-7b-hf",
        _CEN,
        "GQA, MMBench, MME, POPE, SQA, VQAv2, TextVQA, OCRBench, VizWiz, SEED, MMMU",
        100.0,
        ("128", "64", "32"),
        {
            "visionzip": (97.0, 93.4, 88.3),
            "vispruner": (97.0, 94.1, 89.3),
            "prunesid": (96.3, 95.3, 90.7),
            "divprune": (96.9, 94.8, 91.8),
            "cdpruner": (97.3, 96.3, None),
            "Cen-Prune with divprune": (97.7, 96.2, 93.4),
            "MMTok": (97.5, 96.3, 93.4),
            "ZOO-Prune": (97.1, 95.5, 92.6),
            "HoloV": (96.0, 93.1, 89.9),
        },
    ),
    Published(
        "llava-hf/llava-1.5-7b-hf",
        _EADP,
        "VQAv2, GQA, SQA, TextVQA, POPE, MME, MMBench, MMBench-CN, MM-Vet",
        64.9,
        ("128", "64", "32"),
        {
            "visionzip": (62.5, 60.3, 56.0),
            "divprune": (62.5, 60.9, 58.4),
            "cdpruner": (63.2, 61.9, 60.4),
            "EADP": (63.5, 62.2, 60.9),
        },
    ),
    Published("llava-hf/llava-1.5-7b-hf", "ApET (arXiv 2602.19870)", "its own", 100.0, ("64",), {"ApET": (95.2,)}),
    Published(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        _CEN,
        "7 benchmarks",
        100.0,
        ("20%", "10%", "5%"),
        {
            "divprune": (92.1, 85.1, 75.6),
            "cdpruner": (87.1, 79.5, 70.9),
            "Cen-Prune with divprune": (94.5, 88.9, 80.5),
            "MMTok": (91.5, 83.2, 74.2),
        },
    ),
    Published(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        _EADP,
        _EADP_QWEN,
        84.0,
        ("512 of 1,296", "256", "128"),
        {
            "divprune": (78.1, 73.6, 66.4),
            "cdpruner": (71.6, 65.0, 58.2),
            "HiPrune": (75.9, 69.4, 62.3),
            "EADP": (78.0, 74.3, 68.4),
        },
    ),
    Published(
        "Qwen/Qwen3-VL-8B-Instruct",
        _EADP,
        f"{_EADP_QWEN}, DocVQA, InfoVQA",
        84.3,
        ("512 of 1,024", "256", "128"),
        {"divprune": (71.3, 65.3, 59.2), "cdpruner": (71.1, 65.6, 59.2), "EADP": (73.1, 68.2, 62.7)},
    ),
)
"""The newest figures that we know of. None were found for models of Qwen3.5 and later."""

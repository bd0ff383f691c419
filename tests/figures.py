"""The figures in the documents: with which command each was measured, and whether that has changed since."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.documents import PAGES, ROOT

COMPATIBILITY = Path("docs", "compatibility.json")
SOURCE = re.compile(r"run on (?P<machine>[^`;]+?), commit (?P<commit>[0-9a-f]{7,40})\+?: `(?P<command>[^`]+)`")
"""How a page says where figures come from. A plus sign stands for changes that were not committed."""

_PACKAGE = "promprune_vllm"
_ON_CPUS = ("kernels", ":!kernels/triton_*", ":!kernels/entropy_*", "core/select.py")
_OF_IMAGES = (
    "methods",
    *(f":!methods/{name}.py" for name in ("evs", "vidcom2", "promprune_video")),
    *_ON_CPUS,
)
_TRAINED = ("demo/weights/model.safetensors", "demo/weights/config.json", "demo/weights/processor_config.json")
_SCENES = ("demo/scenes", ":!demo/scenes/clips.py", ":!demo/scenes/LICENSES.md", *_TRAINED)
_ASKING = ("evaluation/run.py", "evaluation/sender.py", "evaluation/smaller.py")
_COUNTING = tuple(f"evaluation/{name}.py" for name in ("checks", "escalation", "report", "statistics", "tasks"))
_SAMPLES = ("bench/plain.py", "bench/spectra.py", "bench/workload.py", "bench/machine.py")
_PROMPRUNE = ("methods/promprune.py", *_ON_CPUS)
_RANDOM_MODEL = ("demo/model.py", "demo/random_weights.py")
_SERVED = tuple(f"engine/{name}" for name in ("api_server", "scheduler", "worker", "vllm_fixes"))

DEPENDS_ON: Mapping[str, Sequence[str]] = {
    "bench content": (
        "bench/content.py",
        "core/content_levels.py",
        "engine/api_server/image_complexity.py",
        "demo/images.py",
        *_RANDOM_MODEL,
        *_PROMPRUNE,
    ),
    "bench gpu": (
        "bench/gpu",
        "bench/kernels_cuda.py",
        "bench/prefill.py",
        "core/select.py",
        "kernels",
        "methods",
    ),
    "bench kernels": ("bench/kernels.py", "bench/kernel_cases.py", *_SAMPLES, *_PROMPRUNE),
    "bench prefill": (
        "bench/prefill.py",
        *_SAMPLES,
        *_PROMPRUNE,
        "methods/divprune.py",
        "methods/controls.py",
    ),
    "bench serving": ("bench/serving.py", "bench/load.py", "core/load_levels.py", *_RANDOM_MODEL, *_PROMPRUNE),
    "bench soak": ("bench/soak*.py", *_SERVED, *_OF_IMAGES),
    "calibrate": (
        "core/calibration.py",
        "engine/worker/calibration_run.py",
        *_SCENES,
        *_PROMPRUNE,
    ),
    "compatibility": ("engine",),
    "demo": ("demo/run.py", *_TRAINED, *_PROMPRUNE),
    "eval": (*_OF_IMAGES, *_SCENES, *_ASKING, *_COUNTING),
    "eval --clips": ("bench/clips.py", "demo/scenes", *_TRAINED, "methods", *_ON_CPUS, "core/frames.py"),
    "tune": (
        *(f"tuning/{name}.py" for name in ("asking", "bounds", "demo_questions", "run", "summary")),
        *_OF_IMAGES,
        *_SCENES,
        "evaluation/sender.py",
        "evaluation/smaller.py",
    ),
}
"""What the figures of each command depend on, as patterns of git below ``promprune_vllm``: what is measured and
how, not how it is written down. Only ``bench gpu`` runs on a GPU, so only it depends on Triton's kernels."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures that one command measured at one commit.

    Args:
        kind: Key of ``DEPENDS_ON``.
        commit: What was measured: a commit, or empty if no commit has them yet.
    """

    kind: str
    commit: str

    @property
    def name(self) -> str:
        """Name in lists."""
        return f"{self.kind}, {self.commit[:7]}"


def find_figures() -> list[Figures]:
    """Return the figures of all pages; those of a command and a commit once, however many pages have some."""
    texts = [" ".join(page.read_text().split()) for page in PAGES]
    shown = [Figures(kind_of(each["command"]), each["commit"]) for page in texts for each in SOURCE.finditer(page)]
    return list(dict.fromkeys([*shown, *_of_minors()]))


def kind_of(command: str) -> str:
    """Return the kind of a command: its words without the program, variables and most options."""
    words = [word for word in command.split() if "=" not in word.partition("-")[0]]
    if words[0] != "promprune":
        raise ValueError(f"no command of promprune: {command}")
    if words[1] == "bench":
        return " ".join(words[1:3])
    return "eval --clips" if words[1] == "eval" and "--clips" in words else words[1]


def patterns(kind: str) -> list[str]:
    """Return the patterns of a kind, from the root of the checkout."""
    return [
        f":!{_PACKAGE}/{each.removeprefix(':!')}" if each.startswith(":!") else f"{_PACKAGE}/{each}"
        for each in DEPENDS_ON[kind]
    ]


def git(*words: str) -> str | None:
    """Return what git prints in this checkout, or None if it fails or there is none."""
    if not (ROOT / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def has_all_commits() -> bool:
    """Return whether this is a checkout with its whole history."""
    return git("rev-parse", "--is-shallow-repository") == "false"


def is_out_of_date(figures: Figures) -> bool:
    """Return whether something that figures depend on has changed since, or nobody can tell: no such commit."""
    if not figures.commit:
        return False
    changed = git("log", "-1", "--format=%H", f"{figures.commit}..HEAD", "--", *patterns(figures.kind))
    return changed != ""


def _of_minors() -> Iterator[Figures]:
    """Yield the runs of ``make compatibility``, which note no commit: the one that brought in their time does."""
    for run in json.loads((ROOT / COMPATIBILITY).read_text()).values():
        brought = git("log", "-1", "--format=%h", "--abbrev=12", f"-S{run['time']}", "--", str(COMPATIBILITY))
        yield Figures("compatibility", brought or "")

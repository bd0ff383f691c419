"""What is measured: on a GPU at the widths of models of 7B, and in a rehearsal with everything small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from promprune_vllm.bench.gpu.clock import Cost
from promprune_vllm.bench.load import Load
from promprune_vllm.demo.families import TINY_LLAVA
from promprune_vllm.demo.model import DemoModelSpec

GROUPS = ("environment", "tests", "kernels", "prefill", "vllm")
"""Kinds of stages, in order of value per second."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of every stage.

    Args:
        model: Name of the model that vLLM serves.
        spec: Its sizes. Its weights are random, and never written to disk.
        max_model_len: vLLM's option.
        tests: What pytest runs of ``tests/kernels``, most telling first.
        kernels: ``--case`` of ``bench kernels``.
        prefill: ``--model`` of ``bench prefill``.
        loads: What vLLM serves, each with every budget.
        costs: Group -> time of one of its stages.
        load_seconds: Time of one load: most of it is the start of vLLM's benchmark.
    """

    model: str
    spec: DemoModelSpec
    max_model_len: int
    tests: tuple[str, ...]
    kernels: tuple[str, ...]
    prefill: tuple[str, ...]
    loads: tuple[Load, ...]
    costs: Mapping[str, Cost]
    load_seconds: float


BUDGETS = ("full", 64)
"""The first is what the others are compared with."""

_LLAVA_7B = DemoModelSpec(
    vision_hidden=1024,
    vision_heads=16,
    vision_mlp=4096,
    vision_layers=24,
    hidden=4096,
    heads=32,
    mlp=11008,
    layers=32,
    dtype="bfloat16",
)
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "7b": Shape(
            model="LLaVA-1.5-7B",
            spec=_LLAVA_7B,
            max_model_len=4096,
            tests=("test_triton.py", "test_no_sync.py", "test_entropy_chain.py", "test_compiled.py"),
            kernels=("576x4096:64", "5x576x4096:64", "1296x3584:256", "1024x4096:256"),
            prefill=("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"),
            loads=(Load(1, 16), Load(256, 512)),
            costs=MappingProxyType(
                {
                    "environment": Cost(10, 40),
                    "tests": Cost(40, 100),
                    "kernels": Cost(12, 60),
                    "prefill": Cost(20, 40),
                    "vllm": Cost(150, 60),
                }
            ),
            load_seconds=25,
        ),
        "tiny": Shape(
            model="a tiny LLaVA",
            spec=TINY_LLAVA,
            max_model_len=2048,
            tests=("test_entropy_chain.py::test_the_coefficients_are_those_of_the_fit_and_keep_their_bound",),
            kernels=("60x80:9",),
            prefill=("tiny",),
            loads=(Load(1, 4, image_px=168), Load(4, 8, image_px=168)),
            costs=MappingProxyType(
                {
                    "environment": Cost(3, 40),
                    "tests": Cost(5, 40),
                    "kernels": Cost(10, 60),
                    "prefill": Cost(5, 60),
                    "vllm": Cost(30, 200),
                }
            ),
            load_seconds=10,
        ),
    }
)

"""Puts vLLM's Model Runner V2 under the tests on a CPU: some modules of vLLM are changed as they are imported.

vLLM 0.32 has a V2 runner for CPUs and takes it where Triton has a backend named "cpu". PyPI's Triton has none, but
it has an interpreter. So vLLM is shown such a backend, and its kernels are interpreted. Steps are scheduled ahead
of results, as on every GPU; vLLM switches that off on CPUs.

Only vLLM's import brings Triton: a process without vLLM does not see it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "PROMPRUNE_TEST_RUNNER"
RUNNERS = ("v2-async", "v2", "v1")
"""Model Runner V2 as on GPUs (the default), the same without asynchronous scheduling, and Model Runner V1."""
TRITON = Path(sys.prefix) / "triton-only"
"""`make test` installs Triton there: in the environment itself, vLLM would find it without a backend for CPUs."""
SCHEDULES_AHEAD = "Asynchronous scheduling in the tests:"
"""Begins a line of a server's log."""
_INTERPRET = "TRITON_INTERPRET"
Load = Callable[[ModuleType], None]


def chosen() -> str:
    """Return the runner that the tests are to have.

    Raises:
        ValueError: The variable names none.
    """
    name = os.environ.get(VARIABLE) or RUNNERS[0]
    if name not in RUNNERS:
        raise ValueError(f"{VARIABLE}={name} names no runner: choose from {', '.join(RUNNERS)}")
    return name


def has_triton() -> bool:
    """Return whether there is a Triton that vLLM could be shown."""
    return PathFinder.find_spec("triton") is not None or (TRITON / "triton").is_dir()


def install() -> None:
    """Change the imports of this process. Idempotent; has to come before vLLM is imported."""
    if chosen() == "v1":
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # with a GPU, V2 would be the default
    elif not any(isinstance(finder, _Hooks) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hooks())


class _Hooks(MetaPathFinder):
    """Finds the modules of ``_LOADS``, and has each loaded by the function beside its name."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in _LOADS else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(_LOADS[name], spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _show_triton(load: Load, module: ModuleType) -> None:
    """Load the module that looks for Triton, in a vLLM for CPUs.

    The backend is gone afterwards, since torch's compiler would take it for a real one.
    """
    from vllm.platforms import vllm_version_matches_substr

    if not (vllm_version_matches_substr("cpu") and has_triton()):
        load(module)
        return
    _import_interpreted()
    from triton.backends import Backend, backends
    from triton.backends.driver import DriverBase

    backends["cpu"] = Backend(compiler=None, driver=DriverBase)
    try:
        load(module)
    finally:
        del backends["cpu"]


def _import_interpreted() -> None:
    """Import Triton for kernels that are interpreted in this process; what it starts decides for itself."""
    with _set_variable(_INTERPRET, "1"), _on_path(TRITON):
        knobs = importlib.import_module("triton").knobs
        with _attribute(knobs, "propagate_env", False):
            knobs.runtime.interpret = True  # for kernels that are defined from now on
        interpreter = importlib.import_module("triton.runtime.interpreter")
    _prepare_once(interpreter)
    _look_up_types_once(interpreter)
    # Checking each sum of integers takes a third of the time; kernels that are compiled for GPUs do not either.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_up_types_once(interpreter: Any) -> None:
    """Let the interpreter make its table of types once, not at each value: a tenth of the time."""
    look_up, found = interpreter._get_np_dtype, {}

    def get_np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in found:
            found[name] = look_up(kind)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def _prepare_once(interpreter: Any) -> None:
    """Let the interpreter prepare Triton's language once; for each launch and call, it takes most of a step."""
    prepare, prepared = interpreter._patch_lang, set()
    languages = (interpreter.tl, interpreter.tl.core)

    def patch_lang(function: Any) -> Any:
        seen = frozenset(
            i for i, each in enumerate(languages) if any(value is each for value in function.__globals__.values())
        )
        if seen not in prepared:
            prepare(function)
            prepared.add(seen)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def _hide_triton(load: Load, module: ModuleType) -> None:
    """Load a module that has torch code beside a kernel that the interpreter gets wrong."""
    load(module)
    if not hasattr(module, "HAS_TRITON"):
        raise ImportError(f"{module.__name__} no longer asks for HAS_TRITON: see {__file__}")
    setattr(module, "HAS_TRITON", False)  # noqa: B010  mypy: no attribute of a module


def _schedule_ahead(load: Load, module: ModuleType) -> None:
    """Load the platform, and let it leave asynchronous scheduling as the server's options have it, if wanted."""
    load(module)
    platform: Any = vars(module)["CpuPlatform"]
    original = platform.check_and_update_config

    def check_and_update_config(_: Any, vllm_config: Any) -> None:
        ahead = chosen() == "v2-async" and vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = ahead
        logging.getLogger("vllm").info("%s %s", SCHEDULES_AHEAD, ahead)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _encode_alone(load: Load, module: ModuleType) -> None:
    """Load V2's runner for CPUs, and give an engine that only encodes the runner that it has on a GPU.

    vLLM's worker for CPUs takes one class for all engines, and that runs a language model which was never loaded.
    """
    load(module)
    whole: Any = vars(module)["CPUModelRunner"]

    def make_runner(vllm_config: Any, device: Any) -> Any:
        if not vllm_config.is_mm_encoder_only:
            return whole(vllm_config, device)
        encoder = importlib.import_module("vllm.v1.worker.mm_encoder_model_runner").MMEncoderModelRunner
        alone = type(encoder.__name__, (encoder,), {"warming_up_model": whole.warming_up_model})
        return alone(vllm_config, device)

    setattr(module, "CPUModelRunner", make_runner)  # noqa: B010  mypy: no attribute of a module


_LOADS: dict[str, Callable[[Load, ModuleType], None]] = {
    "vllm.triton_utils.importing": _show_triton,
    "vllm.platforms.cpu": _schedule_ahead,
    "vllm.v1.worker.cpu.model_runner": _encode_alone,
    "vllm.model_executor.models.qwen3_vl": _hide_triton,  # interpreted, bfloat16 becomes NaN
    "vllm.v1.sample.ops.topk_topp_sampler": _hide_triton,  # takes a method of an argument that is a plain int
}


@contextmanager
def _set_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Look for modules in a folder too, behind all others."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

"""Who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "promprune_vllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
HOST = {"vllm", "fastapi", "starlette", "transformers", "prometheus_client"}
FORBIDDEN = {
    "core": HOST | {"triton", "numba"},
    "methods": HOST | {"triton", "numba"},
    "kernels": HOST | {"promprune_vllm"},
    "metrics": {"vllm", "torch", "transformers"},
    "server": {"vllm", "torch", "transformers"},
    "demo": {"vllm"},
    "bench": {"vllm"},
    "evaluation": {"vllm", "torch", "transformers"},
    "overlay": HOST | {"torch"},
    "planning": HOST - {"transformers"} | {"torch"},
}
OURS_ALLOWED = {
    "core": {"core", "errors"},
    "methods": {"core", "kernels", "methods"},
    "kernels": {"kernels"},
    "metrics": {"metrics", "errors"},
    "engine": {"core", "engine", "kernels", "server", "config", "metrics", "errors"},
    "server": {"server", "core", "config", "metrics", "errors"},
    "demo": {"demo", "core", "errors"},
    "bench": {"bench", "core", "demo", "engine", "errors", "kernels"},
    "evaluation": {"evaluation", "core", "demo", "errors", "bench", "markdown"},
    "overlay": {"overlay", "core", "errors"},
    "planning": {"planning", "core", "errors"},
}


@functools.cache
def _parsed(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file, parsed once for all tests."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def _imports(path: Path) -> set[str]:
    nodes = _parsed(path)
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_plan(path: Path) -> None:
    folder = path.relative_to(PACKAGE).parts[0]
    names = _imports(path)
    outside = {name.split(".")[0] for name in names}
    ours = {name.split(".")[1] for name in names if name.startswith("promprune_vllm.")}
    forbidden = FORBIDDEN.get(folder, set())
    if folder == "kernels":  # they know nothing of ours but each other
        outside = {name for name in outside if name != "promprune_vllm"}
    assert not outside & forbidden
    ours -= {"__version__"}
    assert ours <= OURS_ALLOWED.get(folder, ours)
    if folder == "core":
        assert outside <= {"promprune_vllm", "torch", *sys.stdlib_module_names}
    if folder == "server":  # core.budget alone is free of torch
        cores = {name for name in names if name.startswith("promprune_vllm.core")}
        assert all(name.startswith("promprune_vllm.core.budget") for name in cores)
    if "vllm" in outside:
        assert folder == "engine" or path.name == "vllm_cli.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    for node in _parsed(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            assert (node.end_lineno or 0) - node.lineno + 1 - docstring <= 40, node.name


def test_no_module_needs_itself_by_way_of_others() -> None:
    """Imports inside functions count: they hide a circle, and do not break it."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {name: {each for each in _imports(path) if each in modules} - {name} for name, path in modules.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


def test_the_engine_is_laid_out_by_process() -> None:
    """As vLLM itself is. Who looks for a file should not have to read a long list."""
    top = {path.name for path in (PACKAGE / "engine").iterdir() if path.name[0] != "_"}
    packages = {"api_server", "scheduler", "worker", "families", "compat", "vllm_fixes"}
    assert top == packages | {"plugin.py", "patches.py", "keys.py"}


def test_importing_the_package_stays_light() -> None:
    code = "import sys, promprune_vllm; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"vllm", "torch", "fastapi", "transformers", "triton", "numba"} & set(result.stdout.split())

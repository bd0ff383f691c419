"""Who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import typer

from promprune_vllm import cli

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "promprune_vllm"
OUTSIDE = tuple(ROOT / "deploy" / name for name in ("documents", "draw_dashboards", "training"))
"""Code that no wheel carries, held to the same rules."""
MODULES = sorted(path for folder in (PACKAGE, *OUTSIDE) for path in folder.rglob("*.py"))
HOST = {"vllm", "fastapi", "starlette", "transformers", "prometheus_client"}
FORBIDDEN = {
    "core": HOST | {"triton", "numba"},
    "methods": HOST | {"triton", "numba"},
    "kernels": HOST,
    "metrics": {"vllm", "torch", "transformers"},
    "server": {"vllm", "torch", "transformers"},
    "demo": {"vllm"},
    "bench": {"vllm"},
    "evaluation": {"vllm", "torch", "transformers"},
    "tuning": {"vllm", "torch", "transformers"},
    "overlay": HOST | {"torch"},
    "planning": HOST - {"transformers"} | {"torch"},
    "commands": {"fastapi", "starlette", "transformers", "prometheus_client", "torch"},
    "cli.py": HOST | {"torch"},
    "client.py": HOST | {"torch"},
    "config.py": HOST | {"torch"},
    "errors.py": HOST | {"torch"},
    "markdown.py": HOST | {"torch"},
    "__init__.py": HOST | {"torch"},
    "__main__.py": HOST | {"torch"},
    "deploy/documents": HOST | {"torch"},
    "deploy/draw_dashboards": HOST | {"torch"},
    "deploy/training": {"vllm"},
}
"""Part -> what it never imports of other programs: a folder or file of the package, or a folder outside it."""
OURS_ALLOWED: dict[str, set[str]] = {
    "core": {"core", "errors"},
    "methods": {"core", "kernels", "methods"},
    "kernels": {"kernels"},
    "metrics": {"metrics", "errors"},
    "engine": {"core", "engine", "kernels", "server", "config", "metrics", "errors"},
    "server": {"server", "core", "config", "metrics", "errors"},
    "demo": {"demo", "core", "client", "errors"},
    "bench": {"bench", "client", "core", "demo", "engine", "errors", "kernels", "markdown"},
    "evaluation": {"evaluation", "client", "core", "demo", "errors", "bench", "markdown"},
    "tuning": {"tuning", "evaluation", "overlay", "core", "demo", "errors", "bench"},
    "overlay": {"overlay", "client", "core", "errors"},
    "planning": {"planning", "core", "errors"},
    "commands": {
        *("commands", "bench", "demo", "evaluation", "overlay", "planning", "tuning"),
        *("core", "engine", "metrics", "config", "errors", "markdown"),
    },
    "cli.py": {"commands", "demo", "__version__"},
    "client.py": {"server"},
    "config.py": {"core", "errors"},
    "errors.py": set(),
    "markdown.py": set(),
    "__init__.py": {"core"},
    "__main__.py": {"cli"},
    "deploy/documents": {
        *("deploy/documents", "bench", "commands", "config", "engine", "errors", "evaluation"),
        *("markdown", "server"),
    },
    "deploy/draw_dashboards": {"deploy/draw_dashboards"},
    "deploy/training": {"deploy/training", "demo"},
}
"""Part -> what it may import of ours. Each part needs a row here: a new file at the top is one."""
TYPER = {"cli.py", "commands"}


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


def _part(path: Path) -> str:
    """The folder or file of the package that a file is in, or the folder outside it."""
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).parts[0]
    return "/".join(path.relative_to(ROOT).parts[:2])


def _ours(names: set[str]) -> set[str]:
    """The parts of ours that are among imported names."""
    split = [name.split(".") for name in names]
    inside = {parts[1] for parts in split if parts[0] == "promprune_vllm" and len(parts) > 1}
    return inside | {"/".join(parts[:2]) for parts in split if parts[0] == "deploy"}


def test_every_part_has_its_rules() -> None:
    assert {_part(path) for path in MODULES} == OURS_ALLOWED.keys()
    assert OURS_ALLOWED.keys() - FORBIDDEN.keys() == {"engine"}  # which lives inside vLLM
    assert {path.name for path in PACKAGE.iterdir()} <= OURS_ALLOWED.keys() | {"py.typed", "__pycache__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_plan(path: Path) -> None:
    folder = _part(path)
    names = _imports(path)
    outside = {name.split(".")[0] for name in names} - {"promprune_vllm", "deploy"}
    assert not outside & FORBIDDEN.get(folder, set())
    allowed = OURS_ALLOWED[folder] | ({"__version__"} if folder == "engine" else set())
    assert _ours(names) <= allowed
    assert "typer" not in outside or folder in TYPER
    if folder == "core":
        assert outside <= {"torch", *sys.stdlib_module_names}
    if folder == "server":  # these alone are free of torch
        cores = {name for name in names if name.startswith("promprune_vllm.core.")}
        assert {name.split(".")[2] for name in cores} <= {"budget", "escalation"}
    if "vllm" in outside:
        assert folder == "engine" or path == PACKAGE / "commands" / "vllm_cli.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
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
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
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


def test_what_vllm_calls_an_image_is_asked_of_the_family() -> None:
    """Models name it otherwise. Left: parts of a message, a field of the inspector, a limit of `calibrate`."""
    may = {
        "api_server/endpoints.py": 1,
        "api_server/request_fields.py": 1,
        "worker/calibration_run.py": 1,
    }
    engine = PACKAGE / "engine"
    found = {
        path: sum(isinstance(node, ast.Constant) and node.value == "image" for node in _parsed(file))
        for file in engine.rglob("*.py")
        if not (path := file.relative_to(engine).as_posix()).startswith("families/")
    }
    assert {path: count for path, count in found.items() if count} == may


def test_each_command_has_a_module_of_its_name() -> None:
    commands = {name.replace("-", "_") for name in typer.main.get_command(cli.app).commands}  # type: ignore[attr-defined]
    modules = {path.stem for path in (PACKAGE / "commands").glob("*.py")}
    assert {"serve", "methods", "demo_model", "bench", "eval"} <= commands
    assert commands - modules == {"vllm"}  # vllm_cli.py: a module vllm would be one too many
    shared = {"__init__", "failures", "checkout", "serve_options", "calibration_table", "vllm_cli"}
    assert modules - commands == shared


@pytest.mark.parametrize("module", ["promprune_vllm", "promprune_vllm.cli"])
def test_importing_the_package_and_its_command_line_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"vllm", "torch", "fastapi", "transformers", "triton", "numba", "numpy", "pydantic", "httpx", "PIL"}
    assert not heavy & set(result.stdout.split())

"""The tests that every family must pass ask none for its name: what they must know of it is a row of a table.

A name may be a parameter of a fixture or a test. Elsewhere no string and no import may hold a name or part of one,
and ``engine.family`` may be nothing but a key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from promprune_vllm.core.budget import KINDS
from promprune_vllm.demo.families import FAMILIES

ENGINE_TESTS = Path(__file__).parents[1] / "engine"
TABLE = "family_facts.py"
CONTRACT = (
    "family_engine.py",
    "stock.py",
    "test_calibrate.py",
    "test_clips.py",
    "test_families.py",
    "test_family_places.py",
    "test_late_results.py",
    "test_logprobs.py",
    "test_no_hooks.py",
    "test_saliency.py",
    "test_waits.py",
)


def _plain(text: str) -> str:
    """``Qwen2VL`` and ``qwen2_vl`` are one name."""
    return text.lower().replace("_", "")


NAMES = tuple(map(_plain, FAMILIES))


def _tells_families_apart(text: str) -> bool:
    plain = _plain(text)
    if plain in KINDS:  # a modality, though a family is named after it
        return False
    whole = any(name in plain for name in NAMES)
    return whole or (len(plain) > 2 and any(plain in name for name in NAMES))


def _found(node: ast.AST, parent: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """Lines with a name of a family, and what is there."""
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return
        case ast.Call(func=ast.Attribute(attr="parametrize" | "fixture")):
            return
        case ast.Constant(value=str(text)) if _tells_families_apart(text):
            yield node.lineno, repr(text)
        case ast.ImportFrom(module=module) if any(name in _plain(module or "") for name in NAMES):
            yield node.lineno, f"from {module}"
        case ast.alias(name=name) if any(each in _plain(name) for each in NAMES):
            yield node.lineno, f"import {name}"
        case ast.Attribute(attr="family", ctx=ast.Load()) if not isinstance(parent, ast.Subscript):
            yield node.lineno, ast.unparse(parent or node)
    for child in ast.iter_child_nodes(node):
        yield from _found(child, node)


def _names_in(source: str) -> list[str]:
    return [f"line {line}: {text}" for line, text in _found(ast.parse(source))]


@pytest.mark.parametrize("file", CONTRACT)
def test_no_test_of_the_contract_names_a_family(file: str) -> None:
    found = _names_in((ENGINE_TESTS / file).read_text())
    assert not found, f"tests/engine/{file} tells families apart; a fact of one belongs into {TABLE}"


@pytest.mark.parametrize(
    "line",
    [
        "x = 1 if engine.family == 'llava_next' else 2",
        "x = engine.family.startswith(PREFIX)",
        "x = engine.family in TILED",
        "x = family.startswith('qwen')",
        "x = 'vl_moe' in name",
        "x = {'qwen2_vl': 0}[family]",
        "x = config.model_type == f'{qwen}qwen3_5'",
        "x = config.architectures == ['Qwen2VLForConditionalGeneration']",
        "from promprune_vllm.engine.families.qwen2_vl import PrunedQwen2VL",
        "from transformers import LlavaNextForConditionalGeneration",
        "def f():\n    match name:\n        case 'qwen3_5': pass",
    ],
)
def test_a_branch_on_a_name_is_found(line: str) -> None:
    assert _names_in(line)


def test_parameters_keys_and_prose_are_none() -> None:
    allowed = '''
@pytest.fixture(params=[*FAMILIES, pytest.param("qwen3_vl", marks=pytest.mark.release)])
def engine(request): ...


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test(family):
    """For qwen2_vl."""
    self.family = family  # qwen3_5
    return FACTS[engine.family], models[self.family], "image", "."
'''
    assert not _names_in(allowed)

"""Every checkpoint that is shipped or built here names every id that its model can emit."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import promprune_vllm
from promprune_vllm.demo.trained import TRAINED
from tests.checkpoints import CHECKPOINTS, WRITERS, with_unnamed_ids
from tests.documents import ROOT

WORDS = (
    "<unused",
    "_350",
    ">",
    "is there a",
    "Red star",
    "<image>",
    "<s>",
    "USER:",
    "\n",
    " ",
    "color",
    "▁",
    "猫",
)


def tokenizer_of(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_tokenizer_names_every_id_that_the_model_can_emit(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    directory = CHECKPOINTS[name](tmp_path / name)
    with safe_open(directory / "model.safetensors", "pt") as file:
        (head,) = (weight for weight in file.keys() if weight.endswith("lm_head.weight"))  # noqa: SIM118
        rows = file.get_slice(head).get_shape()[0]
    tokenizer = tokenizer_of(directory)
    assert len(tokenizer) == rows
    names = tokenizer.convert_ids_to_tokens(list(range(rows)))
    assert None not in names
    assert len(set(names)) == rows


@pytest.mark.parametrize("name", ["demo", "qwen2_vl", "trained"])
def test_an_unused_token_does_not_show_in_answers(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(CHECKPOINTS[name](tmp_path / name))
    unused = {token: i for token, i in tokenizer.get_vocab().items() if token.startswith("<unused_")}
    assert unused
    assert all(token == f"<unused_{i}>" for token, i in unused.items())
    assert tokenizer.decode(list(unused.values()), skip_special_tokens=True) == ""


def test_no_checkpoint_is_written_that_is_not_looked_at_here() -> None:
    package = Path(promprune_vllm.__file__).parent
    files = [*package.rglob("*.py"), *(ROOT / "deploy" / "training").rglob("*.py")]
    found = {name for file in files for name in _writers(ast.parse(file.read_text()))}
    assert found == set(WRITERS)
    assert sorted(name for names in WRITERS.values() for name in names) == sorted(CHECKPOINTS)


def _writers(tree: ast.Module) -> Iterator[str]:
    """Top-level functions that call what writes weights, but those that the call is made of."""
    for function in tree.body:
        calls = {
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
        }
        if isinstance(function, ast.FunctionDef) and calls & {"write_weights", "save_checkpoint"}:
            yield from {function.name} - {"write_weights"}


def test_the_shipped_tokenizer_is_the_one_that_the_training_writes(tmp_path: Path) -> None:
    from deploy.training import tokenizer

    tokenizer.processor().save_pretrained(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert "tokenizer.json" in written
    assert written == {name: (TRAINED / name).read_bytes() for name in written}


def test_texts_and_answers_are_what_they_are_without_the_unused_tokens(tmp_path: Path) -> None:
    with_names, without = tokenizer_of(TRAINED), tokenizer_of(with_unnamed_ids(tmp_path / "padded"))
    assert (len(with_names), len(without)) == (384, 343)
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choice(WORDS) for _ in range(draw.randrange(10)))
        if "<unused_350>" not in text:
            assert with_names.encode(text) == without.encode(text)
        answer = [draw.randrange(384) for _ in range(10)]
        texts = [each.decode(answer, skip_special_tokens=True) for each in (with_names, without)]
        assert texts[0] == texts[1]

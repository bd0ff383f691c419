"""The measured agreement that the README quotes is the one these tests measure."""

from __future__ import annotations

import json

import pytest

from deploy.documents.methods import AGREEMENT, UNSERVABLE, markdown
from promprune_vllm import methods
from promprune_vllm.commands.methods import describe
from tests.golden import measure, recipe

RECORDED = json.loads(measure.AGREEMENT.read_text(encoding="utf-8"))


def test_every_golden_file_is_measured() -> None:
    assert measure.AGREEMENT == AGREEMENT
    files = {path.stem for path in recipe.HERE.glob("*.npz")}
    assert files == set(measure.COMPARISONS) == set(RECORDED)
    assert files <= set(methods())


@pytest.mark.parametrize("method", [name for name, how in measure.COMPARISONS.items() if how.cheap])
def test_the_file_is_up_to_date(method: str) -> None:
    try:
        measured = measure.agreement(method)
    except LookupError as error:
        pytest.skip(str(error))
    assert RECORDED[method] == measured, "run: python -m tests.golden.measure"


def test_the_table_has_a_line_for_every_method_and_eight_cells_in_each() -> None:
    lines = markdown(describe()).splitlines()
    assert [line.split(" | ")[0].strip("| `") for line in lines[2:]] == [*methods(), *UNSERVABLE]
    assert {len(line.strip("| ").split(" | ")) for line in lines} == {8}

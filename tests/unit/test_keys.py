"""What we leave on other programs' objects has a name in one file, and every name there says whose it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from promprune_vllm.core import budget
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.engine import keys

ENGINE = Path(keys.__file__).parent
NAMES = {
    name: value
    for name, value in vars(keys).items()
    if name.isupper() and isinstance(value, str) and not hasattr(budget, name)
}


def test_every_key_says_that_it_is_ours() -> None:
    assert all(re.match("_*promprune_|visual_token_", value) for value in NAMES.values())
    processor_options = {keys.TEXT_OPTION, keys.DETAIL_OPTION, keys.PLAN, keys.PROFILE, FIELD, METHOD_FIELD}
    assert all(option.startswith(keys.OPTION_PREFIXES) for option in processor_options)


def test_no_other_file_spells_one_out() -> None:
    others = [path for path in ENGINE.rglob("*.py") if path.name != "keys.py"]
    spelled = {
        f"{path.name}: {node.value}"
        for path in others
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES.values()
    }
    assert not spelled


def test_no_file_sets_an_attribute_by_a_key_of_its_own() -> None:
    """``setattr`` on an object of another program, and the dict behind one, take a name of ``keys``."""
    setting = re.compile(r"(?:setattr\([^,]+, |__dict__\.\w+\(|__dict__\[)(\"[^\"]+\"|\w+)")
    found = {
        f"{path.name}: {name}"
        for path in ENGINE.rglob("*.py")
        for name in setting.findall(path.read_text())
        if name not in NAMES
    }
    # The first three are vLLM's own attributes, listed in keys.WRITTEN_ATTRIBUTES; the last one applies a patch.
    assert found == {
        'fault_isolation.py: "get_output"',
        "rotary_tables.py: name",
        "patching.py: name",
    }

"""What the plugin depends on in vLLM: the table, how code is compared, what runs on an unknown version."""

from __future__ import annotations

import ast
import functools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promprune_vllm.engine.compat import fingerprints, parts, seam_table, verdict, versions
from promprune_vllm.engine.compat.parts import Kind, Part
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.compat.seam_table import Recorded
from promprune_vllm.engine.compat.seams import SEAMS
from promprune_vllm.engine.compat.verdict import Verdict
from promprune_vllm.engine.patches import PATCHES

STEPS = list(zip(versions.TESTED, versions.TESTED[1:], strict=False))


def expected(seam: Seam, version: str) -> bool:
    return seam.in_minor(versions.minor_of(version)) and seam.use != "add"


# The table


def test_the_table_has_every_seam_of_every_tested_version() -> None:
    table = seam_table.table()
    assert set(table) == {seam.key for seam in SEAMS}, "`make seams ARGS='--write --all'` writes it"
    for seam in SEAMS:
        for version in versions.TESTED:
            found = seam_table.recorded(seam, version)
            if expected(seam, version):
                assert found is not None, f"{seam.name} in {version}"
                assert set(seam.takes) <= set(found.parameters), f"{seam.name} in {version}"
            elif seam.use == "add" and seam.in_minor(versions.minor_of(version)):
                assert found is None, f"{seam.name} in {version}"


def test_a_seam_begins_and_ends_where_the_table_says() -> None:
    """A limit that vLLM does not have would hide a seam."""
    for seam in SEAMS:
        for limit in filter(None, (seam.since, seam.before)):
            assert any(versions.minor_of(version) == limit for version in versions.TESTED), seam.name


def test_patches_and_seams_agree() -> None:
    patched = {(each.seam.part, each.seam.name) for each in PATCHES if each.target.startswith("vllm")}
    assert patched == {(seam.part, seam.name) for seam in SEAMS if seam.use in ("wrap", "add")}
    for each in PATCHES:
        assert each.seam.part == each.reason.part
        assert (each.seam.use == "add") == each.wrapper.rpartition(":")[2].startswith("add_"), each.target


def test_every_part_depends_on_something_and_says_what_is_lost() -> None:
    every = {part for part in vars(parts).values() if isinstance(part, Part)} - {parts.COMMAND}
    assert every == {seam.part for seam in SEAMS}
    assert len({part.name for part in every}) == len(every)
    for part in every:
        assert bool(part.without) == (part.kind is not Kind.COMMON), part.name
        assert bool(part.architectures) == (part.kind is Kind.FAMILY), part.name


_ENCODE = ("_process_image_input", "_process_vision_input", "_process_video_pixels")


def test_every_family_depends_on_a_tower_a_processor_and_positions() -> None:
    from promprune_vllm.engine.families import FAMILIES

    for architecture in FAMILIES:
        names = [seam.name for seam in SEAMS if architecture in seam.part.architectures and seam.body]
        for words in (("embed_multimodal",), ("_get_prompt_updates",), ("forward",), _ENCODE):
            needed = any(name.endswith(words) for name in names)
            inherits = architecture.startswith("LlavaNext") and words == ("_get_prompt_updates",)
            assert needed or inherits, f"{architecture}: {words}"


# Reading code

PACKAGE = {
    "__init__.py": "from vllm.moved import helper\n",
    "moved.py": "def helper(a, b):\n    return a\n",
    "code.py": '''
        import logging
        logger = logging.getLogger(__name__)

        class Base:
            pass

        class Thing(Base):
            """A thing."""

            size: int = 3
            name: str

            @property
            def area(self) -> int:
                # a comment
                logger.info("asked %s", self)
                return self.size ** 2

            def text(
                self, given: str, *rest: int, key: str = "k", **more: object
            ) -> str:
                """Docstring."""
                joined = """
        at the margin
        """ + given
                if key:
                    self.seen = joined
                return f"{joined} of {self.size:>3}"

            @staticmethod
            def text_of(one): return one

        def text(x): return x
''',
}


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Path]:
    def make(**replaced: str) -> Path:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "vllm"
        folder.mkdir(parents=True)
        for name, text in PACKAGE.items():
            content = textwrap.dedent(text)
            for old, new in replaced.items():
                content = content.replace(OLD[old], new)
            (folder / name).write_text(content)
        return folder

    return make


OLD = {
    "comment": "# a comment",
    "docstring": "Docstring.",
    "log": "asked %s",
    "annotation": "given: str",
    "constant": "** 2",
    "margin": "at the margin",
    "format": ":>3",
    "condition": "if key:",
    "decorator": "@property",
}
AREA, TEXT = "vllm.code:Thing.area", "vllm.code:Thing.text"


def code(folder: Path, name: str, *words: str) -> str:
    found = fingerprints.find(folder, name)
    assert found is not None
    return found.fingerprint(words)


def test_parameters_are_read_from_the_file(package: Callable[..., Path]) -> None:
    folder = package()
    for name, parameters in {
        AREA: ("self",),
        TEXT: ("self", "given", "rest", "key", "more"),
        "vllm.code:Thing": ("size", "name"),
        "vllm.code:text": ("x",),
        "vllm:helper": ("a", "b"),  # imported from elsewhere
    }.items():
        found = fingerprints.find(folder, name)
        assert found is not None, name
        assert found.parameters == parameters
    for missing in ("vllm.code:Thing.tex", "vllm.code:Base.area", "vllm.none:Thing", "vllm:other"):
        assert fingerprints.find(folder, missing) is None, missing


@pytest.mark.parametrize("what", ["comment", "docstring", "log", "annotation"])
def test_what_does_not_run_is_not_compared(package: Callable[..., Path], what: str) -> None:
    changed = package(**{what: {"annotation": "given: int", "log": "changed"}.get(what, "# another")})
    assert [code(changed, name) for name in (AREA, TEXT)] == [code(package(), name) for name in (AREA, TEXT)]


@pytest.mark.parametrize(
    ("what", "new", "name"),
    [
        ("constant", "** 3", AREA),
        ("decorator", "@cached_property", AREA),
        ("margin", "elsewhere", TEXT),
        ("format", ":>4", TEXT),
        ("condition", "if not key:", TEXT),
    ],
)
def test_what_runs_is_compared(package: Callable[..., Path], what: str, new: str, name: str) -> None:
    changed, same = package(**{what: new}), package()
    assert code(changed, name) != code(same, name)
    other = AREA if name == TEXT else TEXT
    assert code(changed, other) == code(same, other)


def test_only_the_statements_with_a_word_are_compared(package: Callable[..., Path]) -> None:
    same = package()
    assert code(package(condition="if not key:"), TEXT, "seen") == code(same, TEXT, "seen")
    assert code(package(condition="if not key:"), TEXT, "key") != code(same, TEXT, "key")
    assert code(package(margin="elsewhere"), TEXT, "joined") != code(same, TEXT, "joined")


def test_code_that_this_python_cannot_parse_counts_as_gone(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "new.py").write_text("def f(x):\n    return x ?? 3\n\ndef g(x):\n    return x\n")
    assert fingerprints.find(tmp_path / "vllm", "vllm.new:f") is None
    assert fingerprints.find(tmp_path / "vllm", "vllm.new:g") is not None


def test_the_lines_that_are_cut_out_are_those_that_python_finds() -> None:
    """In the installed vLLM: a whole file parsed gives the same code as the lines of a definition."""
    vllm = pytest.importorskip("vllm")
    package = Path(vllm.__file__).parent
    minor = versions.installed_minor()
    compared = 0
    parse = functools.cache(lambda file: ast.parse(file.read_text()))
    for seam in SEAMS:
        module, _, path = seam.name.partition(":")
        file = package.parent.joinpath(*module.split(".")).with_suffix(".py")
        if not expected(seam, f"{minor}.0") or not file.is_file():
            continue
        nodes: Any = [parse(file)]
        for name in path.split("."):
            inside = [
                child for node in nodes for child in node.body if isinstance(child, fingerprints._Definition)
            ]
            nodes = [child for child in inside if child.name == name]
        if nodes:
            whole = fingerprints.Found(tuple(nodes))
            found = fingerprints.find(package, seam.name)
            assert found is not None
            assert found.fingerprint(seam.words) == whole.fingerprint(seam.words), seam.name
            compared += 1
    assert compared > 120


# What runs on an unknown version


def replay(tested: tuple[str, ...], version: str) -> Verdict:
    """What a release that was tested with these versions makes of another one, from the table alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "TESTED", tested)
        return verdict.compare(lambda seam: seam_table.recorded(seam, version), version)


def known_until(version: str) -> tuple[str, ...]:
    return versions.TESTED[: versions.TESTED.index(version) + 1]


def test_a_release_that_knows_only_the_minor_before() -> None:
    """The history of vLLM: which minors would have run at once, which features were off, what was named."""
    found = {new: replay(known_until(old), new) for old, new in STEPS}
    assert {new: each.stock for new, each in found.items()} == {
        "0.30.0": True,
        "0.31.0": True,
        "0.32.0": True,  # vLLM rewrote how cache keys are made
        "0.33.0": False,
    }
    assert found["0.33.0"].moved == {
        "resending": ("vllm.v1.engine.async_llm:AsyncLLM._run_output_handler (code changed)",)
    }
    assert found["0.33.0"].reference == "0.32.0"
    keys = "vllm.multimodal.processing.processor:BaseMultiModalProcessor._get_mm_hashes (exists now)"
    assert keys in found["0.32.0"].moved["processor"]
    assert {"processor", "M-RoPE", "Qwen2-VL", "Qwen2.5-VL"} <= set(found["0.30.0"].moved)
    assert {"processor", "failed images", "Qwen2-VL", "Qwen3-VL"} <= set(found["0.31.0"].moved)


def test_a_tested_version_is_as_it_was_tested() -> None:
    for version in versions.TESTED:
        assert replay(versions.TESTED, version).moved == {}


def test_older_than_all_is_stock() -> None:
    found = replay(versions.TESTED[1:], versions.TESTED[0])
    assert found.reference == versions.TESTED[1]
    assert found.stock
    assert "is older than" in verdict.message(verdict.compare(changed(), "0.28.1"))


def changed(*names: str, gone: bool = False) -> Callable[[Seam], Recorded | None]:
    """The newest version with other code in some functions, or without them."""

    def find(seam: Seam) -> Recorded | None:
        found = seam_table.recorded(seam, versions.TESTED[-1])
        if found is None or seam.name not in names:
            return found
        return None if gone else Recorded("another", found.parameters)

    return find


NEXT = "0.99.0"


def of_tier(tier: str) -> list[Seam]:
    newest = versions.minor_of(versions.TESTED[-1])
    return [seam for seam in SEAMS if seam.tier == tier and seam.use != "add" and seam.in_minor(newest)]


def users(name: str, *, body: bool) -> set[Part]:
    newest = versions.minor_of(versions.TESTED[-1])
    return {seam.part for seam in SEAMS if seam.name == name and seam.in_minor(newest) and (seam.body or not body)}


@pytest.mark.parametrize("seam", of_tier("core"), ids=lambda seam: f"{seam.part.name}-{seam.name}")
def test_changed_core_code_stops_all_or_its_families(seam: Seam) -> None:
    found = verdict.compare(changed(seam.name), NEXT)
    assert set(found.moved) == {part.name for part in users(seam.name, body=True)}
    if any(part.kind is Kind.COMMON for part in users(seam.name, body=True)):
        assert found.stock
        assert "PromPrune is off" in verdict.message(found)
    else:
        assert not found.stock
        for architecture in seam.part.architectures:
            assert seam.name in str(found.family_reason(architecture))
        assert found.family_reason("Qwen9ForConditionalGeneration") is None
    assert seam.name in verdict.message(found)
    assert verdict.OVERRIDE in verdict.message(found)


@pytest.mark.parametrize("seam", of_tier("side"), ids=lambda seam: seam.name)
def test_changed_side_code_turns_its_feature_off(seam: Seam) -> None:
    found = verdict.compare(changed(seam.name), NEXT)
    assert [*found.moved] == [seam.part.name]
    assert not found.stock
    assert f"Off: {seam.part.name} ({seam.part.without})" in verdict.message(found)
    assert not any(patch.seam.part == seam.part for patch in PATCHES if not found.is_off(patch.reason.part))


@pytest.mark.parametrize("seam", of_tier("call"), ids=lambda seam: f"{seam.part.name}-{seam.name}")
def test_changed_code_of_a_call_changes_nothing_but_a_missing_name_does(seam: Seam) -> None:
    found = verdict.compare(changed(seam.name), NEXT)
    assert set(found.moved) == {part.name for part in users(seam.name, body=True)}
    without = verdict.compare(changed(seam.name, gone=True), NEXT)
    assert set(without.moved) == {part.name for part in users(seam.name, body=False)}
    assert f"{seam.name} (gone)" in without.moved[seam.part.name]


def test_nothing_changed_is_one_sentence() -> None:
    found = verdict.compare(changed(), NEXT)
    assert found.moved == {}
    text = verdict.message(found)
    assert text.startswith(
        f"vLLM {NEXT} is newer than this release of promprune-vllm, which was tested with 0.29.0"
    )
    assert f"{found.seams} of {found.seams} functions" in text
    assert "Everything runs." in text


def test_the_override_ignores_code_but_not_what_is_gone() -> None:
    core = "vllm.multimodal.processing.processor:BaseMultiModalProcessor.apply"
    found = verdict.compare(changed(core), NEXT, ignore_code=True)
    assert (found.moved, [*found.ignored]) == ({}, ["processor"])
    assert "ignores changes of" in verdict.message(found)
    gone = verdict.compare(changed(core, gone=True), NEXT, ignore_code=True)
    assert gone.stock
    assert verdict.OVERRIDE not in verdict.message(gone)


def test_a_verdict_survives_the_way_to_a_child_process() -> None:
    found = verdict.compare(changed("vllm.v1.engine.async_llm:AsyncLLM._run_output_handler"), NEXT)
    assert verdict.loads(verdict.dumps(found)) == found
    assert json.loads(verdict.dumps(found))["version"] == NEXT

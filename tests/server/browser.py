"""A real Chromium: of `make tools`, or the machine's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.docker_engine import TOOLS

ARTEFACTS = Path(__file__).parents[2] / "build" / "screenshots"
_NAMES = ("chromium-headless-shell", "chromium", "google-chrome")


def _found() -> tuple[str, dict[str, str]] | None:
    unpacked = TOOLS / "usr/lib/chromium/chromium-headless-shell"
    if unpacked.is_file():
        libraries = [str(path) for path in (TOOLS / "usr/lib").glob("*-linux-gnu")]
        libraries += [str(path / "pulseaudio") for path in (TOOLS / "usr/lib").glob("*-linux-gnu")]
        return str(unpacked), {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)}
    installed = next((path for name in _NAMES if (path := shutil.which(name))), None)
    return None if installed is None else (installed, dict(os.environ))


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's; skips the test, with the reason, where there is none that starts."""
    from playwright.sync_api import sync_playwright

    found = _found()
    if found is None:
        pytest.skip(f"no Chromium: `make tools` unpacks one as root, or install one of {', '.join(_NAMES)}")
    path, environment = found
    tried = subprocess.run([path, "--version"], env=environment, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{path} does not start: {tried.stderr.strip()[-300:]}")
    options = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options, env=environment)
        try:
            yield browser
        finally:
            browser.close()

"""In every process of one test's server: says what is patched there, as soon as it is asked.

A process is asked by a file, not by a call or a signal, so that what it does is not disturbed and every kind of
process can be asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(os.environ["PROMPRUNE_TEST_PATCHED"])


def _answer() -> None:
    while not (FOLDER / "ask").exists():
        time.sleep(0.5)
    from tests.patched import patched

    answer = FOLDER / f"{os.getpid()}.part"
    answer.write_text(json.dumps({"patched": sorted(patched()), "loaded": sorted(sys.modules)}))
    answer.rename(answer.with_suffix(".json"))


def _start() -> None:
    threading.Thread(target=_answer, daemon=True).start()


def start() -> None:
    os.register_at_fork(after_in_child=_start)
    _start()

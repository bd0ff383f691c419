"""In every process that a test starts: Python imports this module at start, as ``PYTHONPATH`` has this folder."""

from __future__ import annotations

import os

import runner_hooks

runner_hooks.install()
if "PROMPRUNE_TEST_PATCHED" in os.environ:
    import patched_answer

    patched_answer.start()

"""A pytest plugin: the processes of `whole_suite.py` take the modules of tests from one list, each once.

Each process begins at its own end: one with the tests that share servers, the other with all other folders. The
first to finish takes modules that the other has left, beginning with those that start servers of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER, SERVERS = "SUITE_QUEUE", "SUITE_SERVERS"
"""Variables: the folder in which modules are claimed; whether this process begins with the servers' tests."""
SHARED = {"server", "stock", "every_method", "videos"}
"""Servers of a whole folder: a second process that takes a test of theirs starts them once more."""


def _name(item: pytest.Item) -> str:
    """Return what is claimed with a test: its module, or the modules that share engines with its own."""
    module = item.path.relative_to(item.config.rootpath).with_suffix("")
    return str(getattr(getattr(item, "module", None), "TOGETHER", ".".join(module.parts)))


def ordered(items: list[pytest.Item], servers_first: bool) -> list[tuple[str, list[pytest.Item]]]:
    """Return modules with their tests, in the order in which a process takes them."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(_name(item), []).append(item)

    def rank(name: str) -> int:
        """0 where servers are shared, 1 where a test starts its own, 2 where there are none."""
        first = modules[name][0]
        if "server" not in first.path.relative_to(first.config.rootpath).parts:
            return 2
        return int(not any(SHARED & {*getattr(item, "fixturenames", ())} for item in modules[name]))

    groups = [[name for name in modules if rank(name) == each] for each in range(3)]
    servers, alone, others = groups
    order = [*servers, *alone, *reversed(others)] if servers_first else [*others, *reversed(alone), *servers]
    return [(name, modules[name]) for name in order]


def _claimed(name: str) -> bool:
    """Claim a module, unless the other process has."""
    try:
        os.close(os.open(Path(os.environ[FOLDER]) / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _taken(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    for name, tests in ordered(items, servers_first=bool(os.environ.get(SERVERS))):
        if _claimed(name):
            yield from tests


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run what this process takes, as pytest's own loop runs all."""
    if session.config.option.collectonly or session.testsfailed:
        return None  # pytest's own says what could not be collected
    taken = _taken(session.items)
    item = next(taken, None)
    while item is not None:
        following = next(taken, None)  # fixtures that it shares are kept, all others end with this test
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True

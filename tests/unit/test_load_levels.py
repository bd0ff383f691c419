"""The controller that lowers ``"auto"`` under load, and the readings it gets."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promprune_vllm.core.load_levels import LEVELS, Load, LoadLevels, LoadLimits

LOADS = st.builds(Load, st.floats(0, 1), st.integers(0, 100))
STEPS = st.floats(0.01, 3)
CALM, PRESSURE = Load(0.0, 0), Load(0.99, 50)
TICK = 0.25


def _run(
    levels: LoadLevels, load: Callable[[Fraction], Load], seconds: float, start: float = 0.0
) -> list[Fraction]:
    """Let a plant answer to the level, reading it four times a second."""
    seen = []
    for i in range(int(seconds / TICK)):
        seen.append(levels.observe(load(levels.level), start + i * TICK))
    return seen


def _changes(levels: list[Fraction]) -> int:
    return sum(a != b for a, b in pairwise(levels))


@given(st.lists(st.tuples(LOADS, STEPS), max_size=200))
def test_it_moves_one_level_at_a_time_within_the_levels(history: list[tuple[Load, float]]) -> None:
    levels, now, before = LoadLevels(), 0.0, 0
    for load, step in history:
        now += step
        index = LEVELS.index(levels.observe(load, now))
        assert abs(index - before) <= 1
        before = index


@given(st.lists(st.tuples(LOADS, STEPS), max_size=100), LOADS)
def test_a_constant_reading_moves_it_in_one_direction_only(history: list[tuple[Load, float]], load: Load) -> None:
    levels, now = LoadLevels(), 0.0
    for each, step in history:
        now += step
        levels.observe(each, now)
    seen = _run(levels, lambda _: load, 300, now)
    assert seen in (sorted(seen), sorted(seen, reverse=True))


@given(st.lists(st.tuples(LOADS, STEPS), max_size=100))
def test_it_is_back_at_the_full_default_some_time_after_the_load_has_gone(
    history: list[tuple[Load, float]],
) -> None:
    levels, now, limits = LoadLevels(), 0.0, LoadLimits()
    for load, step in history:
        now += step
        levels.observe(load, now)
    longest = (len(LEVELS) - 1) * (limits.longest_release + TICK) + TICK
    assert _run(levels, lambda _: CALM, longest + 1, now)[-1] == 1


@given(st.floats(0, 8), st.sampled_from(LEVELS))
def test_a_constant_load_on_the_cache_settles(demand: float, start: Fraction) -> None:
    """What fills the cache is proportional to the level at most: text does not shrink, so it changes less."""
    levels, now = LoadLevels(), 0.0
    while levels.level != start:
        now += TICK
        levels.observe(PRESSURE, now)
    seen = _run(levels, lambda level: Load(min(1.0, demand * float(level))), 600, now + 100)
    assert seen in (sorted(seen), sorted(seen, reverse=True))


@pytest.mark.parametrize("admitted", LEVELS[1:])
def test_a_queue_that_comes_back_is_tried_ever_more_rarely(admitted: Fraction) -> None:
    levels = LoadLevels()
    seen = _run(levels, lambda level: Load(0.1, 0 if level <= admitted else 10), 3600)
    assert levels.level in (admitted, 2 * admitted)
    assert set(seen[40:]) == {admitted, 2 * admitted}
    assert _changes(seen[-4 * 600 :]) <= 2 * 600 / LoadLimits().longest_release + 2
    assert seen.count(admitted) > 0.95 * len(seen)


def test_pressure_acts_within_two_seconds_and_calm_only_after_a_while() -> None:
    levels = LoadLevels()
    down = _run(levels, lambda _: PRESSURE, 2)
    assert down[0] == 1
    assert down[-1] == LEVELS[-1]
    up = _run(levels, lambda _: CALM, 16, 2)
    assert up[int(4 / TICK)] == LEVELS[-1]
    assert up[-1] == 1


def test_a_spike_shorter_than_the_limit_changes_nothing() -> None:
    levels = LoadLevels()
    assert levels.observe(PRESSURE, 0.0) == 1
    assert levels.observe(PRESSURE, 0.4) == 1
    assert levels.observe(CALM, 0.5) == 1
    assert levels.observe(PRESSURE, 0.6) == 1


def test_the_worst_engine_decides() -> None:
    assert Load.worst([Load(0.2, 9), Load(0.9, 0)]) == Load(0.9, 9)
    assert Load.worst([]) == Load()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_api_servers_share_what_the_engines_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = pytest.importorskip("promprune_vllm.engine.api_server.load_monitor")
    monkeypatch.setenv("PROMPRUNE_METRICS_DIR", str(tmp_path))
    clock = Clock()
    heard, silent = (load.LoadMonitor(tmp_path / "load", "m", clock=clock) for _ in range(2))

    def pass_time(seconds: float) -> None:
        for _ in range(int(seconds / TICK)):
            clock.now += TICK
            heard.update_level()
            silent.update_level()

    heard.record_load(0, CALM)
    heard.record_load(1, PRESSURE)
    pass_time(3)
    assert heard.level == silent.level == LEVELS[-1]
    pass_time(60)
    assert heard.level == silent.level == 1, "an engine that says nothing for half a minute is idle"


def start(self: object, vllm_config: object, executor_class: object, log_stats: bool) -> None:
    """As vLLM's clients of an engine are started."""
    raise AssertionError("started")


@pytest.mark.parametrize(
    ("variables", "option"),
    [
        ({}, r"adapt-to-load \(PROMPRUNE_ADAPT_TO_LOAD\)"),
        ({"PROMPRUNE_AUDIT": "1%"}, r"audit \(PROMPRUNE_AUDIT\)"),
        ({"PROMPRUNE_AUDIT": "1%", "PROMPRUNE_ADAPT_TO_LOAD": "1"}, r"adapt-to-load \(PROMPRUNE_ADAPT_TO_LOAD\)"),
    ],
)
def test_statistics_that_are_off_are_refused_by_both_names(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], option: str
) -> None:
    load = pytest.importorskip("promprune_vllm.engine.api_server.load_monitor")
    from promprune_vllm.errors import SettingsError

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=rf"--visual-token-{option} .*--disable-log-stats"):
        load.require_statistics(start)(object(), None, None, log_stats=False)


def test_a_program_of_vllms_without_statistics_starts_and_audits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    load = pytest.importorskip("promprune_vllm.engine.api_server.load_monitor")
    monkeypatch.setenv("PROMPRUNE_AUDIT", "1%")

    class Program:
        def step(self) -> None:
            """As that of vllm.LLM has."""

    with pytest.raises(AssertionError, match="started"):
        load.require_statistics(start)(Program(), None, None, log_stats=False)
    assert load.current_load() == Load()

"""Reads the engines' load in the API server, and derives the level: the share of the default that images keep.

vLLM's plugins for statistics cannot be switched off: one that is merely installed turns the statistics on and is
called in every step. So we wrap the one method that receives the statistics, and only with ``adapt_to_load`` or
``audit``.

With several API servers, an engine sends each step's statistics to only one of them. So all servers write what
they get to one small file, and each reads the whole file, at slightly different times. Their levels may therefore
differ for as long as one step takes; the metric shows the lowest.
"""

from __future__ import annotations

import inspect
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from promprune_vllm.config import FLAG, PREFIX, Settings
from promprune_vllm.core.load_levels import Load, LoadLevels, LoadLimits
from promprune_vllm.errors import SettingsError
from promprune_vllm.metrics.recorder import DIRECTORY_VARIABLE, prepare_directory, recorder

logger = logging.getLogger("vllm.promprune")
_SECONDS_BETWEEN_READINGS = 0.25
_STALE_SECONDS = 30.0
"""An engine that has sent no statistics for so long is idle: it sends some after every step."""
_SLOT = struct.Struct("ddd")  # time (system-wide monotonic clock), KV usage, waiting requests
_SLOTS = 1024  # one per engine; engine 1024 would overwrite engine 0

_monitor: LoadMonitor | None = None


def current_level() -> Fraction:
    """Return the share of the default that images keep now; 1 unless budgets adapt to load."""
    return Fraction(1) if _monitor is None else _monitor.level


def current_load() -> Load:
    """Return the load of the busiest engine, as reported last; none where no monitor runs."""
    return Load() if _monitor is None else _monitor.load()


class LoadMonitor:
    """The latest load of all engines, and the level derived from it.

    Args:
        file: File with the engines' loads, shared by all API servers of this machine.
        model_name: Label of the level's metric.
        limits: What counts as pressure.
        clock: Monotonic seconds, the same in all processes that share the file.
    """

    def __init__(
        self,
        file: Path,
        model_name: str,
        limits: LoadLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _SLOT.size * _SLOTS)  # fills with zeros, unless another server did so before
            self._slots = mmap.mmap(descriptor, _SLOT.size * _SLOTS)
        finally:
            os.close(descriptor)
        self._clock = clock
        self._model_name = model_name
        self._levels = LoadLevels(limits)
        self.level = self._levels.level

    def record_load(self, engine: int, load: Load) -> None:
        """Write an engine's load to the shared file."""
        _SLOT.pack_into(
            self._slots, engine % _SLOTS * _SLOT.size, self._clock(), load.kv_usage, float(load.waiting)
        )

    def update_level(self) -> None:
        """Read the latest load of every engine and adjust the level."""
        load = self.load()
        before, self.level = self.level, self._levels.observe(load, self._clock())
        if self.level != before:
            recorder(self._model_name).level(self.level)
            logger.info(
                'PromPrune: "auto" keeps %s of the default (KV cache %.0f%% used, %d requests waiting).',
                self.level,
                100 * load.kv_usage,
                load.waiting,
            )

    def load(self) -> Load:
        """Return the fullest cache and the longest queue of all engines."""
        return Load.worst(self._recent())

    def _recent(self) -> Iterator[Load]:
        now = self._clock()
        for when, usage, waiting in _SLOT.iter_unpack(self._slots):
            if when and now - when < _STALE_SECONDS:
                yield Load(usage, int(waiting))


def require_statistics(original: Any) -> Any:
    """Wrap the start of vLLM's engine client: refuse to start without statistics, otherwise start the monitor."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        settings = Settings.from_environment()
        adapts = settings.adapt_to_load or not settings.audited_share()
        option = "adapt-to-load" if adapts else "audit" if settings.target is None else "target"
        if not adapts and hasattr(self, "step"):  # the engine of vllm.LLM, which audits nothing
            original(self, *args, **kwargs)
            return
        arguments = inspect.signature(original).bind(self, *args, **kwargs).arguments
        if not arguments["log_stats"]:
            raise SettingsError(
                f"{FLAG}{option} ({PREFIX}{option.replace('-', '_').upper()}) needs the engine's statistics, and "
                "--disable-log-stats (disable_log_stats, the default of vllm.LLM) turns them off. Drop one of "
                "the two."
            )
        original(self, *args, **kwargs)
        model_name = arguments["vllm_config"].model_config.served_model_name
        # After the engine's processes have started: they must not inherit the thread.
        _start_monitor(model_name, adapts=adapts)

    return init


def _start_monitor(model_name: str, *, adapts: bool) -> None:
    global _monitor  # noqa: PLW0603  one per process, like the engine client
    if _monitor is not None:
        return
    prepare_directory()
    _monitor = LoadMonitor(Path(os.environ[DIRECTORY_VARIABLE]) / "load", model_name)
    if adapts:
        logger.info('PromPrune adapts to load: under pressure, "auto" keeps fewer tokens of an image.')
        # A thread, so that the level also recovers when no more steps and requests come.
        threading.Thread(target=_update_forever, args=(_monitor,), name="promprune-load", daemon=True).start()


def _update_forever(monitor: LoadMonitor) -> None:
    while True:
        time.sleep(_SECONDS_BETWEEN_READINGS)
        monitor.update_level()


def record_statistics(original: Any) -> Any:
    """Wrap the method that receives every step's statistics: record the engine's load."""

    def record(
        self: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        if scheduler_stats is not None and _monitor is not None:
            load = Load(scheduler_stats.kv_cache_usage, scheduler_stats.num_waiting_reqs)
            _monitor.record_load(engine_idx or 0, load)
        original(self, scheduler_stats, iteration_stats, mm_cache_stats=mm_cache_stats, engine_idx=engine_idx)

    return record

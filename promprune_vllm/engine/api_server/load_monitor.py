"""How busy the engines are, in the API server: their own statistics, and the level that follows from them.

vLLM's entry points for statistics cannot be off: one that is merely installed switches the statistics on and
is called for every step. So the one method that receives them is wrapped, and only with ``adapt_to_load``.

Several API servers: an engine gives each step's statistics to only one of them, so all of them write what they
get into one small file, and each reads the whole file, a moment apart from the others. A moment can decide about a
step, so levels may differ for as long as a step takes; the metric shows the lowest.
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

from promprune_vllm.config import FLAG, PREFIX
from promprune_vllm.core.adaptive import Load, LoadLevels, LoadLimits
from promprune_vllm.errors import SettingsError
from promprune_vllm.metrics.recorder import DIRECTORY_VARIABLE, prepare_directory, recorder

logger = logging.getLogger("vllm.promprune")
_SECONDS_BETWEEN_READINGS = 0.25
_STALE_SECONDS = 30.0
"""An engine that has said nothing for so long has nothing to do: it speaks after every step."""
_SLOT = struct.Struct("ddd")  # when (system-wide monotonic clock), KV usage, waiting
_SLOTS = 1024  # engines told apart; a step of engine 1024 would overwrite that of engine 0

_watch: LoadWatch | None = None


def current_level() -> Fraction:
    """Return the share of the default that images keep now; 1 where nothing adapts to load."""
    return Fraction(1) if _watch is None else _watch.level


class LoadWatch:
    """The readings of all engines and the level that follows from them.

    Args:
        file: Where the readings are, shared by all API servers of this machine.
        model_name: Of the level's metric.
        limits: What counts as pressure.
        clock: Monotonic seconds, the same for all who share the file.
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
            os.ftruncate(descriptor, _SLOT.size * _SLOTS)  # zeros, unless another server was first
            self._readings = mmap.mmap(descriptor, _SLOT.size * _SLOTS)
        finally:
            os.close(descriptor)
        self._clock = clock
        self._model_name = model_name
        self._levels = LoadLevels(limits)
        self.level = self._levels.level

    def tell(self, engine: int, load: Load) -> None:
        """Write down what an engine said."""
        _SLOT.pack_into(
            self._readings, engine % _SLOTS * _SLOT.size, self._clock(), load.kv_usage, float(load.waiting)
        )

    def read(self) -> None:
        """Look at every engine's last word, and move the level if it is time."""
        now = self._clock()
        load = Load.worst(self._recent(now))
        before, self.level = self.level, self._levels.observe(load, now)
        if self.level != before:
            recorder(self._model_name).level(self.level)
            logger.info(
                'PromPrune: "auto" keeps %s of the default (KV cache %.0f%% used, %d requests waiting).',
                self.level,
                100 * load.kv_usage,
                load.waiting,
            )

    def _recent(self, now: float) -> Iterator[Load]:
        for when, usage, waiting in _SLOT.iter_unpack(self._readings):
            if when and now - when < _STALE_SECONDS:
                yield Load(usage, int(waiting))


def require_statistics(original: Any) -> Any:
    """Wrap the start of vLLM's front end: refuse to start without statistics, else begin to watch."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(original).bind(self, *args, **kwargs).arguments
        if not arguments["log_stats"]:
            raise SettingsError(
                f"{FLAG}adapt-to-load ({PREFIX}ADAPT_TO_LOAD) follows the engine's statistics, and "
                "--disable-log-stats (disable_log_stats, the default of vllm.LLM) turns them off. Drop one of "
                "the two."
            )
        original(self, *args, **kwargs)
        model_name = arguments["vllm_config"].model_config.served_model_name
        _start_watching(model_name)  # after the engine's processes were made: they must not inherit the thread

    return init


def _start_watching(model_name: str) -> None:
    global _watch  # noqa: PLW0603  one per process, as the engine client is
    if _watch is not None:
        return
    prepare_directory()
    _watch = LoadWatch(Path(os.environ[DIRECTORY_VARIABLE]) / "load", model_name)
    # A thread, so that the level also goes back where no step and no request comes any more.
    logger.info('PromPrune watches the load: under pressure, "auto" keeps less of an image.')
    threading.Thread(target=_read_forever, args=(_watch,), name="promprune-load", daemon=True).start()


def _read_forever(watch: LoadWatch) -> None:
    while True:
        time.sleep(_SECONDS_BETWEEN_READINGS)
        watch.read()


def listen(original: Any) -> Any:
    """Wrap the method that gets every step's statistics."""

    def record(
        self: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> None:
        if scheduler_stats is not None and _watch is not None:
            load = Load(scheduler_stats.kv_cache_usage, scheduler_stats.num_waiting_reqs)
            _watch.tell(engine_idx or 0, load)
        original(self, scheduler_stats, iteration_stats, mm_cache_stats=mm_cache_stats, engine_idx=engine_idx)

    return record

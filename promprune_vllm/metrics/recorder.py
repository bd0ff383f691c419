"""The only writer of metrics.

vLLM runs the API server and the workers in processes of their own, and each writes here. Values live in mmap
files of one directory, which the server's ``/metrics`` reads: vLLM's own directory where it made one (several
API servers), otherwise a private one beside vLLM's registry. vLLM's own series are the same with and without us.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from promprune_vllm.metrics import catalog
from promprune_vllm.metrics.catalog import CATALOG, Metric

DIRECTORY_VARIABLE = "PROMPRUNE_METRICS_DIR"
_OWNER_VARIABLE = "PROMPRUNE_METRICS_OWNER"
VLLM_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def prepare_directory() -> None:
    """Make the private directory, once, in a server's first process; the processes it spawns inherit it.

    A process that was not spawned by multiprocessing is a first one: a server started from a program that has
    the plugin loaded inherits that program's variable, and must not write into its directory.
    """
    if DIRECTORY_VARIABLE in os.environ and (_made_here() or multiprocessing.parent_process() is not None):
        return
    directory = tempfile.mkdtemp(prefix="promprune-metrics-")
    os.environ[DIRECTORY_VARIABLE] = directory
    os.environ[_OWNER_VARIABLE] = str(os.getpid())
    atexit.register(_remove, directory, os.getpid())


def _made_here() -> bool:
    return os.environ.get(_OWNER_VARIABLE) == str(os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def expose() -> None:
    """Make this process's ``/metrics`` show what every process wrote."""
    # Every series is there before the first request: counts at zero, the level at all of the default.
    recorder().level(Fraction(1))
    if VLLM_VARIABLE not in os.environ:
        _attach(os.environ[DIRECTORY_VARIABLE])


def recorder() -> Recorder:
    """Return this process's recorder."""
    prepare_directory()
    directory = os.environ.get(VLLM_VARIABLE) or os.environ[DIRECTORY_VARIABLE]
    return _recorder(os.getpid(), directory)


class Recorder:
    """Counts into the files of one directory."""

    def __init__(self, directory: str) -> None:
        with _values_in(directory):
            # Every labelled series is created here as well: it could not find the directory later.
            self._metrics = {metric.name: _build(metric) for metric in CATALOG}

    def prompt(self, seen_tokens: int, kept_tokens: int) -> None:
        """Count a prompt with images: its visual tokens before and after pruning."""
        self._metrics[catalog.TOKENS_SEEN.name].inc(seen_tokens)
        self._metrics[catalog.TOKENS_KEPT.name].inc(kept_tokens)
        self.outcome("pruned" if kept_tokens < seen_tokens else "full")

    def outcome(self, outcome: str) -> None:
        """Count a prompt by what became of it, one of ``OUTCOMES``."""
        self._metrics[catalog.REQUESTS.name].labels(outcome).inc()

    def selection(self, seconds: float) -> None:
        """Observe the time one image's selection took."""
        self._metrics[catalog.SELECTION_SECONDS.name].observe(seconds)

    def level(self, level: Fraction) -> None:
        """Show the share of the default that images keep from now on."""
        self._metrics[catalog.POLICY_LEVEL.name].set(float(level))


@lru_cache(maxsize=2)
def _recorder(pid: int, directory: str) -> Recorder:  # noqa: ARG001  a forked child gets files of its own
    return Recorder(directory)


@cache
def _attach(directory: str) -> None:
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    MultiProcessCollector(REGISTRY, path=directory)  # type: ignore[no-untyped-call]


def _build(metric: Metric) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    labels = [metric.label[0]] if metric.label else []
    family: Any
    if metric.kind == "counter":
        family = Counter(metric.name, metric.help, labels, registry=None)
    elif metric.kind == "gauge":
        family = Gauge(metric.name, metric.help, labels, registry=None, multiprocess_mode="mostrecent")
    else:
        family = Histogram(metric.name, metric.help, labels, registry=None, buckets=metric.buckets)
    for value in metric.label[1] if metric.label else ():
        family.labels(value)
    return family


@contextmanager
def _values_in(directory: str) -> Iterator[None]:
    """While open, prometheus_client creates its values as mmap files in ``directory``.

    It decides that once per process when imported, from the environment; vLLM has imported it by the time a
    plugin runs. The two module-level names used are checked by a test.
    """
    from prometheus_client import values

    before = values.ValueClass, os.environ.get(VLLM_VARIABLE)
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    os.environ[VLLM_VARIABLE] = directory
    try:
        yield
    finally:
        values.ValueClass = before[0]
        if before[1] is None:
            del os.environ[VLLM_VARIABLE]
        else:
            os.environ[VLLM_VARIABLE] = before[1]

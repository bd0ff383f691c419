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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from promprune_vllm.errors import SettingsError
from promprune_vllm.metrics import catalog
from promprune_vllm.metrics.catalog import CATALOG, Metric

DIRECTORY_VARIABLE = "PROMPRUNE_METRICS_DIR"
_OWNER_VARIABLE = "PROMPRUNE_METRICS_OWNER"
VLLM_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_FILE_BYTES = 1 << 20
"""Of each of a process's three files: all series of all methods fill half of it, so they never grow."""


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


def expose(model_name: str, methods: Sequence[str], versions: tuple[str, str], *, derived: bool) -> None:
    """Make this process's ``/metrics`` show what every process wrote, every series before its first event.

    Args:
        model_name: What the model is served as.
        methods: Those the server allows, the default first.
        versions: Of promprune-vllm and of vLLM.
        derived: Whether bytes and operations saved can be told for this model; else they are not shown, for a
            zero would say that there were none.
    """
    ours = recorder(model_name)
    ours.create([metric for metric in CATALOG if derived or not metric.derived], methods)
    ours.level(Fraction(1))
    ours.build(methods[0], *versions)
    if VLLM_VARIABLE not in os.environ:
        _attach(os.environ[DIRECTORY_VARIABLE])


def recorder(model_name: str) -> Recorder:
    """Return this process's recorder for a model."""
    prepare_directory()
    directory = os.environ.get(VLLM_VARIABLE) or os.environ[DIRECTORY_VARIABLE]
    return _recorder(os.getpid(), directory, model_name)


@dataclass(frozen=True, slots=True)
class Saving:
    """What a prompt's pruning saves; see the catalogue for what exactly is meant."""

    kv_bytes: int
    flops: int


class Recorder:
    """Counts into the files of one directory, for one model."""

    def __init__(self, directory: str, model_name: str) -> None:
        self._directory = directory
        self._model_name = model_name
        self._series: dict[tuple[str, ...], Any] = {}
        self._values = _mapped_values(directory, os.getpid())
        with self._mapping():
            self._families = {metric.name: _family(metric) for metric in CATALOG}

    def create(self, metrics: Sequence[Metric], methods: Sequence[str]) -> None:
        """Show every series of these metrics at zero; but no gauge, which shows the lowest any process set."""
        for metric in metrics:
            if metric.kind == "gauge":
                continue
            for values in metric.series(self._model_name, methods):
                self._at(metric, *values[1:])

    def prompt(self, method: str, images: Sequence[tuple[int, int, bool]], saving: Saving | None = None) -> None:
        """Count a prompt with images.

        Args:
            method: What selects the tokens of images that lose any.
            images: Of each image, visual tokens seen and kept, and whether it came from the processor cache.
            saving: What pruning saves, where that is known.
        """
        for seen, kept, cached in images:
            by = method if kept < seen else catalog.UNPRUNED
            self._at(catalog.IMAGES, by, str(cached).lower()).inc()
            self._at(catalog.TOKENS_SEEN, by).inc(seen)
            self._at(catalog.TOKENS_KEPT, by).inc(kept)
            self._at(catalog.IMAGE_KEPT_TOKENS, by).observe(kept)
            if kept < seen:
                self._at(catalog.TOKENS_SAVED, by).inc(seen - kept)
        pruned = any(kept < seen for seen, kept, _ in images)
        if saving is not None and pruned:
            self._at(catalog.KV_BYTES_SAVED, method).inc(saving.kv_bytes)
            self._at(catalog.FLOPS_AVOIDED, method).inc(saving.flops)
        self.outcome("pruned" if pruned else "full")

    def outcome(self, outcome: str) -> None:
        """Count a prompt by what became of it, one of ``OUTCOMES``."""
        self._at(catalog.REQUESTS, outcome).inc()

    def refused(self, reason: str) -> None:
        """Count a refused request, for one of ``REASONS``."""
        self.outcome("refused")
        self._at(catalog.REFUSED, reason).inc()

    def budget(self, form: str) -> None:
        """Count a budget that came with images, in one of ``FORMS``."""
        self._at(catalog.BUDGETS, form).inc()

    def selection(self, method: str, stage: str, seconds: float) -> None:
        """Observe the time that one of ``STAGES`` took for one image."""
        self._at(catalog.SELECTION_SECONDS, method, stage).observe(seconds)

    def entropy(self, method: str, value: float) -> None:
        """Observe the spectral entropy of one selection, 0 to 1."""
        self._at(catalog.SPECTRAL_ENTROPY, method).observe(value)

    def saliency_share(self, method: str, value: float) -> None:
        """Observe the share of salient tokens in one selection, 0 to 1."""
        self._at(catalog.SALIENCY_SHARE, method).observe(value)

    def encoder_batch(self, tokens: int) -> None:
        """Observe the unpruned tokens of one call of the vision encoder."""
        self._at(catalog.ENCODER_BATCH_TOKENS).observe(tokens)

    def level(self, level: Fraction) -> None:
        """Show the share of the default that images keep from now on."""
        self._at(catalog.POLICY_LEVEL).set(float(level))

    def build(self, method: str, version: str, vllm_version: str) -> None:
        """Show what runs: the default method, and the versions of promprune-vllm and of vLLM."""
        self._at(catalog.BUILD_INFO, method, version, vllm_version).set(1)

    @contextmanager
    def _mapping(self) -> Iterator[None]:
        """While open, prometheus_client creates its values as ours.

        It decides that once per process when imported, from the environment; vLLM has imported it by the time a
        plugin runs. The two module-level names used are checked by a test.
        """
        from prometheus_client import values

        before = values.ValueClass, os.environ.get(VLLM_VARIABLE)
        values.ValueClass = self._values
        os.environ[VLLM_VARIABLE] = self._directory
        try:
            yield
        finally:
            values.ValueClass = before[0]
            if before[1] is None:
                del os.environ[VLLM_VARIABLE]
            else:
                os.environ[VLLM_VARIABLE] = before[1]

    def _at(self, metric: Metric, *values: str) -> Any:
        """Return a series of this model, by the values of its other labels."""
        key = (metric.name, *values)
        if key not in self._series:
            with self._mapping():  # a new series could not find the directory by itself
                self._series[key] = self._families[metric.name].labels(self._model_name, *values)
        return self._series[key]


@lru_cache(maxsize=4)
def _recorder(pid: int, directory: str, model_name: str) -> Recorder:  # noqa: ARG001  a forked child gets its own
    return Recorder(directory, model_name)


@cache
def _attach(directory: str) -> None:
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    MultiProcessCollector(REGISTRY, path=directory)  # type: ignore[no-untyped-call]


def _family(metric: Metric) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    if metric.kind == "counter":
        return Counter(metric.name, metric.help, metric.labels, registry=None)
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, metric.labels, registry=None, multiprocess_mode="min")
    return Histogram(metric.name, metric.help, metric.labels, registry=None, buckets=metric.buckets)


@cache
def _mapped_values(directory: str, pid: int) -> Any:
    """Return prometheus_client's class of values in mmap files, with files of our own in ``directory``.

    The files get their room on the disk at once: to write into a mapped page for which a disk has no room left
    kills the process, without an error that anybody could catch. They have names of their own because in vLLM's
    directory its values lie in files by process too, and two writers of one file overwrite each other. For that
    reason, too, there is one class for a directory.

    Raises:
        SettingsError: The directory cannot be written to.
    """
    from prometheus_client import values

    for kind in ("counter", "gauge_min", "histogram"):
        path = os.path.join(directory, f"{kind}_{_name(pid)}.db")
        try:
            with open(path, "ab") as file:
                os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
        except OSError as error:
            raise SettingsError(
                f"Metrics cannot be kept in {directory} ({error.strerror}): make room there, or name another "
                "place with TMPDIR."
            ) from error
    return values.MultiProcessValue(lambda: _name(pid))  # type: ignore[no-untyped-call]


def _name(pid: int) -> str:
    return f"promprune-{pid}"

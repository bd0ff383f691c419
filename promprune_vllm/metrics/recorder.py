"""The only writer of metrics.

vLLM runs the API server and the workers in separate processes, and each writes its values to mmap files in one
directory, which the server's ``/metrics`` reads. It is vLLM's own directory if vLLM made one (several API
servers), otherwise a private one next to vLLM's registry. vLLM's own series are the same with and without us.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from promprune_vllm.metrics import catalog
from promprune_vllm.metrics.catalog import CATALOG
from promprune_vllm.metrics.mapped_files import mapped_values
from promprune_vllm.metrics.metric import RESULTS, SIZES, UNPRUNED, Metric

DIRECTORY_VARIABLE = "PROMPRUNE_METRICS_DIR"
_OWNER_VARIABLE = "PROMPRUNE_METRICS_OWNER"
VLLM_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def prepare_directory() -> None:
    """Create the private directory, once, in a server's first process; the processes it spawns inherit it.

    Any process not spawned by multiprocessing is a first process: a server started from a program that has the
    plugin loaded inherits that program's variable, and must not write into its directory.
    """
    if DIRECTORY_VARIABLE in os.environ and (_owns_directory() or multiprocessing.parent_process() is not None):
        return
    directory = tempfile.mkdtemp(prefix="promprune-metrics-")
    os.environ[DIRECTORY_VARIABLE] = directory
    os.environ[_OWNER_VARIABLE] = str(os.getpid())
    atexit.register(_remove, directory, os.getpid())


def _owns_directory() -> bool:
    return os.environ.get(_OWNER_VARIABLE) == str(os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)


def expose(model_name: str, methods: Sequence[str], build: Build, *, derived: bool) -> None:
    """Make this process's ``/metrics`` show the values of all processes, and every series before its first event.

    Args:
        model_name: Name the model is served under.
        methods: The methods the server allows, the default first.
        build: What runs.
        derived: Whether the bytes and operations saved are known for this model. If not, these metrics are left
            out, since zeros would mean that nothing was saved.
    """
    writer = recorder(model_name)
    writer.create([metric for metric in CATALOG if derived or not metric.derived], methods)
    writer.level(Fraction(1))
    for size in SIZES:
        writer.target(size, Fraction(1), 0.0)
    writer.build(methods[0], build)
    if VLLM_VARIABLE not in os.environ:
        _attach(os.environ[DIRECTORY_VARIABLE])


def recorder(model_name: str) -> Recorder:
    """Return this process's recorder for a model."""
    prepare_directory()
    directory = os.environ.get(VLLM_VARIABLE) or os.environ[DIRECTORY_VARIABLE]
    return _recorder(os.getpid(), directory, model_name)


@dataclass(frozen=True, slots=True)
class Build:
    """Which versions run, and what of ours does not run on that vLLM.

    Args:
        version: Of promprune-vllm.
        vllm_version: Of vLLM.
        vllm_tested: Whether this release was tested with that version.
        parts_off: Name of a part that depends on vLLM's code -> whether it is off.
    """

    version: str
    vllm_version: str
    vllm_tested: bool = True
    parts_off: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saving:
    """What pruning saves for one prompt; the catalog defines both exactly."""

    kv_bytes: int
    flops: int


class Recorder:
    """Writes the metrics of one model to the files of one directory."""

    def __init__(self, directory: str, model_name: str) -> None:
        self._directory = directory
        self._model_name = model_name
        self._series: dict[tuple[str, ...], Any] = {}
        self._values = mapped_values(directory, os.getpid())
        with self._mapping():
            self._families = {metric.name: _family(metric) for metric in CATALOG}

    def create(self, metrics: Sequence[Metric], methods: Sequence[str]) -> None:
        """Create every series of these metrics at zero. Not gauges: they show the lowest value of any process."""
        for metric in metrics:
            if metric.kind == "gauge":
                continue
            for values in metric.series(self._model_name, methods):
                self._at(metric, *values[1:])

    def prompt(
        self, method: str, items: Sequence[tuple[str, int, int, bool]], saving: Saving | None = None
    ) -> None:
        """Count a prompt with images or videos.

        Args:
            method: The method that prunes those of them that lose tokens.
            items: For each image or video, which of ``MODALITIES`` it is, its tokens before pruning, the tokens
                kept, and whether it came from the processor cache.
            saving: What pruning saves, if known.
        """
        for modality, total, kept, cached in items:
            labels = (method if kept < total else UNPRUNED, modality)
            self._at(catalog.IMAGES, *labels, str(cached).lower()).inc()
            self._at(catalog.TOKENS_SEEN, *labels).inc(total)
            self._at(catalog.TOKENS_KEPT, *labels).inc(kept)
            self._at(catalog.IMAGE_KEPT_TOKENS, *labels).observe(kept)
            if kept < total:
                self._at(catalog.TOKENS_SAVED, *labels).inc(total - kept)
        pruned = any(kept < total for _, total, kept, _ in items)
        if saving is not None and pruned:
            self._at(catalog.KV_BYTES_SAVED, method).inc(saving.kv_bytes)
            self._at(catalog.FLOPS_AVOIDED, method).inc(saving.flops)
        self.outcome("pruned" if pruned else "full")

    def outcome(self, outcome: str) -> None:
        """Count a prompt by its outcome, one of ``OUTCOMES``."""
        self._at(catalog.REQUESTS, outcome).inc()

    def refused(self, reason: str) -> None:
        """Count a refused request by reason, one of ``REASONS``."""
        self.outcome("refused")
        self._at(catalog.REFUSED, reason).inc()

    def budget(self, form: str) -> None:
        """Count a budget sent with images or videos by its kind, one of ``FORMS``."""
        self._at(catalog.BUDGETS, form).inc()

    def escalation(self, decision: str, confidence: float | None = None) -> None:
        """Count what became of a first try, one of ``DECISIONS``, and its confidence if it was decided by that."""
        self._at(catalog.ESCALATIONS, decision).inc()
        if confidence is not None:
            self._at(catalog.CONFIDENCE).observe(confidence)

    def discarded(self, **tokens: int) -> None:
        """Count the tokens of a first try that was thrown away, by kind, as in ``DISCARDED``."""
        for kind, count in tokens.items():
            self._at(catalog.DISCARDED_TOKENS, kind).inc(count)

    def audit(self, result: str) -> None:
        """Count what became of a request that was drawn for an audit, one of ``AUDITS``."""
        self._at(catalog.AUDIT_REQUESTS, result).inc()

    def audit_tokens(self, tokens: int) -> None:
        """Count the tokens that an audit processed."""
        self._at(catalog.AUDIT_TOKENS).inc(tokens)

    def audited(self, method: str, kept: str, *, tokens: int, agreeing: float, whole: float, nats: float) -> None:
        """Count what an audit found; see ``Finding``.

        Args:
            method: The method that pruned the prompt.
            kept: One of ``KEPT``.
            tokens: Tokens of the answer.
            agreeing: How many of them agree.
            whole: Probability that all of them do.
            nats: Nats per token.
        """
        counts = ((catalog.AUDITED_TOKENS, tokens, agreeing), (catalog.AUDITED_ANSWERS, 1, whole))
        for metric, all_of_them, agree in counts:
            self._at(metric, method, kept, "true").inc(agree)
            self._at(metric, method, kept, "false").inc(max(0.0, all_of_them - agree))
        self._at(catalog.AUDIT_NATS, method).observe(nats)

    def first_token(self, pruned: bool, seconds: float) -> None:
        """Observe how long a client waited for the first token of an answer."""
        self._at(catalog.FIRST_TOKEN_SECONDS, str(pruned).lower()).observe(seconds)

    def selection(self, method: str, stage: str, seconds: float) -> None:
        """Observe how long one of ``STAGES`` took for one image."""
        self._at(catalog.SELECTION_SECONDS, method, stage).observe(seconds)

    def entropy(self, method: str, value: float) -> None:
        """Observe the spectral entropy of one selection, 0 to 1."""
        self._at(catalog.SPECTRAL_ENTROPY, method).observe(value)

    def saliency_share(self, method: str, value: float) -> None:
        """Observe the share of salient tokens of one selection, 0 to 1."""
        self._at(catalog.SALIENCY_SHARE, method).observe(value)

    def encoder_batch(self, tokens: int) -> None:
        """Observe the number of unpruned tokens in one call of the vision encoder."""
        self._at(catalog.ENCODER_BATCH_TOKENS).observe(tokens)

    def feature_lookups(self, hits: int, misses: int) -> None:
        """Count images that the feature cache had and had not."""
        for result, images in zip(RESULTS, (hits, misses), strict=True):
            self._at(catalog.FEATURE_STORE_IMAGES, result).inc(images)

    def feature_store_bytes(self, stored_bytes: int) -> None:
        """Set the size of the images in this process's feature cache."""
        self._at(catalog.FEATURE_STORE_BYTES).set(stored_bytes)

    def level(self, level: Fraction) -> None:
        """Set the share of the default that images and videos keep from now on."""
        self._at(catalog.POLICY_LEVEL).set(float(level))

    def target(self, size: str, share: Fraction, proof: float) -> None:
        """Set what one of ``SIZES`` keeps under a target, and how far the next smaller share is proven."""
        self._at(catalog.TARGET_SHARE, size).set(float(share))
        self._at(catalog.TARGET_PROOF, size).set(proof)

    def trial(self, size: str, agreed: float) -> None:
        """Count an answer that was scored with the next smaller share: how probably it is the same."""
        self._at(catalog.TARGET_TRIALS, size, "true").inc(agreed)
        self._at(catalog.TARGET_TRIALS, size, "false").inc(1 - agreed)

    def build(self, method: str, build: Build) -> None:
        """Set the build info: the default method, the versions, and the parts that are off."""
        tested = str(build.vllm_tested).lower()
        self._at(catalog.BUILD_INFO, method, build.version, build.vllm_version, tested).set(1)
        for part, is_off in build.parts_off.items():
            self._at(catalog.PART_OFF, part).set(int(is_off))

    @contextmanager
    def _mapping(self) -> Iterator[None]:
        """Make prometheus_client create its values in our files while this context is open.

        prometheus_client decides where values live once per process, on import, from the environment; vLLM has
        imported it by the time a plugin runs. A test checks the two module-level names used here.
        """
        from prometheus_client import values

        previous_class, previous_directory = values.ValueClass, os.environ.get(VLLM_VARIABLE)
        values.ValueClass = self._values
        os.environ[VLLM_VARIABLE] = self._directory
        try:
            yield
        finally:
            values.ValueClass = previous_class
            if previous_directory is None:
                del os.environ[VLLM_VARIABLE]
            else:
                os.environ[VLLM_VARIABLE] = previous_directory

    def _at(self, metric: Metric, *values: str) -> Any:
        """Return a series of this model by the values of its labels other than the model."""
        key = (metric.name, *values)
        if key not in self._series:
            with self._mapping():  # without it, a new series would not be written to the directory
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
        return Gauge(metric.name, metric.help, metric.labels, registry=None, multiprocess_mode=metric.combine)
    return Histogram(metric.name, metric.help, metric.labels, registry=None, buckets=metric.buckets)

"""The server that ``promprune eval`` starts without ``--url``: the demo model, with all methods for images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from promprune_vllm.demo.model import find_or_build_demo_model
from promprune_vllm.demo.server import one_worker, serving
from promprune_vllm.demo.trained import TRAINED


@contextmanager
def a_server(url: str | None, model: Path | None, err: Console) -> Iterator[str]:
    """Yield the address of the server to ask: the given one, or one started here.

    Args:
        url: A running server; the model is then unused.
        model: Checkpoint to serve; the demo model by default.
        err: Console that shows the progress.
    """
    if url is not None:
        yield url
        return
    from promprune_vllm.core.registry import methods

    options = ["--enforce-eager", "--max-model-len", "2048", "--block-size", "32", "--max-num-seqs", "64"]
    options += ["--served-model-name", "demo", "--dtype", "float32", "--disable-uvicorn-access-log"]
    options += ["--visual-token-allow-methods", ",".join(methods(over_frames=False))]
    # Methods that read the question select anew for each: kept features spare the encoder all but the first time.
    variables = {"VLLM_CPU_KVCACHE_SPACE": "2", "PROMPRUNE_FEATURE_CACHE_GB": "2"}
    options, environment = one_worker(options, variables)
    err.print("Starting a server …", highlight=False)
    with serving(model or _demo_model(err), *options, environment=environment) as server:
        yield server.url


def _demo_model(err: Console) -> Path:
    """Return the trained model, or if there is none in this checkout, the one with random weights."""
    if (TRAINED / "config.json").is_file():
        return TRAINED
    err.print("This checkout has no trained model: the random weights used instead give meaningless answers.")
    return find_or_build_demo_model()

"""A real vLLM with random weights, pruned against unpruned: nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from promprune_vllm.bench import load, serving
from promprune_vllm.bench.gpu.clock import Deadline
from promprune_vllm.bench.gpu.shapes import BUDGETS, Shape
from promprune_vllm.demo import model, processing, server
from promprune_vllm.demo.model import DemoModelSpec

LOG = "server.log"
_V2, _GRAPHS = "Using V2 Model Runner", "Graph capturing finished"
_INFORMATION = "KV cache size"
_CACHE = "vllm:cache_config_info"


def measure(shape: Shape, device: str, out: Path, deadline: Deadline) -> Generator[dict[str, Any], None, None]:
    """Serve the shape's model, put each load on it with each budget, and yield the document after each.

    Args:
        shape: Model and loads.
        device: ``cpu`` or ``cuda``; on CUDA vLLM chooses its model runner and its graphs as for anybody.
        out: Folder for the server's log.
        deadline: When to stop.

    Raises:
        DemoError: The server did not start.
        BenchError: A load failed.
        TimeoutError: There is no time for the next load.
    """
    checkpoint = write_checkpoint(shape.spec)
    options, environment = server_options(shape, device)
    started, log = time.monotonic(), out / LOG
    with server.serving(
        checkpoint, *options, log=log, environment=environment, timeout_seconds=deadline.left()
    ) as running:
        document = {
            "model": shape.model,
            "vocabulary": processing.VOCAB_SIZE,
            "command": shlex.join(["promprune", "serve", "MODEL", *options]),
            "start_seconds": round(time.monotonic() - started, 1),
            **_described(log),
            **_cache(running),
        }
        rows: list[dict[str, Any]] = []
        yield {**document, "rows": rows}
        for row in _loads(running.url, shape, deadline):
            usable = document["kv_blocks"] - 1  # vLLM's share is of all blocks but its null block
            blocks = {f"kv_blocks_{name}": row[f"kv_usage_{name}"] * usable for name in ("mean", "max")}
            rows.append({**row, **blocks})
            yield {**document, "rows": rows}


def _loads(url: str, shape: Shape, deadline: Deadline) -> Iterator[dict[str, Any]]:
    for one in shape.loads:
        first: load.Result | None = None
        for i, budget in enumerate(BUDGETS):
            deadline.require(shape.load_seconds, f"a load of {one.concurrency} in flight, budget {budget},")
            # New images for every run: those of an earlier one are still cached.
            sent = replace(one, seed=1000 * i + one.concurrency)
            result = load.run(url, sent, budget, timeout_seconds=deadline.left())
            first = first or result
            yield {**asdict(result), "requests": one.requests, "ratios": serving.ratios(result, first)}


def server_options(shape: Shape, device: str) -> tuple[list[str], Mapping[str, str]]:
    """Return the options of ``promprune serve``, and variables."""
    options = ["--load-format", "dummy", "--max-model-len", str(shape.max_model_len)]
    options += ["--served-model-name", "model"]
    if device == "cuda":
        return [*options, "--dtype", "bfloat16"], {}
    options += ["--dtype", "float32", "--block-size", "32", "--enforce-eager"]
    return server.one_worker(options, {"VLLM_CPU_KVCACHE_SPACE": "1"})


def write_checkpoint(spec: DemoModelSpec) -> Path:
    """Return a directory with configuration, tokenizer and processor of a spec, but no weights."""
    digest = hashlib.sha256(json.dumps(asdict(spec)).encode()).hexdigest()[:12]
    return model.build_demo_model(model.cache_directory() / f"gpu-llava-{digest}", spec, weights=False)


def _described(log: Path) -> dict[str, Any]:
    """Return what the server's log says of the model runner and of CUDA graphs; ``None`` if it says too little."""
    said = log.read_text(encoding="utf-8", errors="replace")
    if _INFORMATION not in said:  # a higher level was set with VLLM_LOGGING_LEVEL
        return {"model_runner": None, "cuda_graphs": None}
    return {"model_runner": "V2" if _V2 in said else "V1", "cuda_graphs": _GRAPHS in said}


def _cache(running: server.Server) -> dict[str, int]:
    labels = running.families(_CACHE)[0].samples[0].labels
    return {"kv_blocks": int(labels["num_gpu_blocks"]), "block_tokens": int(labels["block_size"])}

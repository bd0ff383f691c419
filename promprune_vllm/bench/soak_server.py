"""The server that a soak starts: with so few resources that it is always short of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from promprune_vllm.client import base_url
from promprune_vllm.demo.model import find_or_build_demo_model
from promprune_vllm.demo.server import is_healthy, log_end, one_worker, serving
from promprune_vllm.errors import BenchError

_LITTLE = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "2048"),
    *("--block-size", "32", "--max-num-seqs", "16"),
    *("--num-gpu-blocks-override", "128", "--max-num-batched-tokens", "640", "--mm-processor-cache-gb", "0.05"),
    *("--limit-mm-per-prompt", '{"image": 3}', "--served-model-name", "demo"),
    *("--visual-token-allow-methods", "random,divprune"),
)
# By default glibc keeps much of the freed memory, in fragments, and a server seems to grow for an hour.
_GIVEN_BACK = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}


@contextmanager
def a_server(
    url: str | None, model: Path | None, show_progress: Callable[[str], None]
) -> Iterator[tuple[str, int | None]]:
    """Yield the address and the process id of the server to soak: the given one (without id), or one started here.

    The latter has few KV blocks, short steps and small caches, so that requests are preempted, images arrive in
    chunks and cache entries are evicted all the time. Its allocator returns freed memory, so that growth means a
    leak.

    Args:
        url: A running server; the model is then unused.
        model: Checkpoint to serve; the demo model by default.
        show_progress: Called with a line of text on the progress.
    """
    if url is not None:
        yield base_url(url), None
        return
    show_progress("Starting a server with few resources …")
    options, environment = one_worker(_LITTLE, {"VLLM_CPU_KVCACHE_SPACE": "1", **_GIVEN_BACK})
    with serving(model or find_or_build_demo_model(), *options, environment=environment) as server:
        yield server.url, server.process.pid
        if not is_healthy(server.url):
            raise BenchError(f"The server died during the soak.\n{log_end(server.log, 60)}")

"""If the engine lacks an image of a request, the request is sent again with the image, instead of failing.

The API server does not send an image that the engine should already have in its cache, and assumes that it has
every image processed before. That is wrong if the earlier request never reached the engine: its client had
disconnected, or its prompt was too long. vLLM (0.29 to 0.33) then answers the next request with that image with
HTTP 500, and leaves the retry to the client.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from promprune_vllm.engine.keys import REPROCESS

_QUEUE = "queue_mm_cache_invalidations"

logger = logging.getLogger("vllm.promprune")


def remember_prompt(original: Any) -> Any:
    """Wrap the processing of a prompt: if images were left out, attach a function that processes it in full."""

    async def process(self: Any, prompt: Any, **kwargs: Any) -> Any:
        # A copy: vLLM takes embeddings of text out of the prompt, and the second time they would be missing.
        engine_input = await original(self, dict(prompt), **kwargs)
        items = (engine_input.get("mm_kwargs") or {}).values()
        if any(item is None for each in items for item in each):
            engine_input[REPROCESS] = partial(original, self, prompt, **{**kwargs, "skip_mm_cache": True})
        return engine_input

    return process


def resend_on_cache_miss(original: Any) -> Any:
    """Wrap the call of the engine: if it lacks an image, send the request again with all of its images."""

    def generate(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        reprocess = prompt.pop(REPROCESS, None) if isinstance(prompt, dict) else None
        if reprocess is None:
            outputs: AsyncIterator[Any] = original(self, prompt, *args, **kwargs)
            return outputs
        return resend(self, reprocess, prompt, *args, **kwargs)

    async def resend(self: Any, reprocess: Any, prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(original(self, prompt, *args, **kwargs)) as outputs:
            async for output in outputs:
                if reprocess is not None and _is_cache_miss(self, prompt, output):
                    break
                reprocess = None  # frees the images
                yield output
            else:
                return
        logger.info("The engine no longer had an image; the request is sent again with all of its images.")
        async with aclosing(original(self, {**prompt, **await reprocess()}, *args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    return generate


def _is_cache_miss(engine: Any, prompt: Any, output: Any) -> bool:
    """Return whether the engine lacked an image: it failed, and the API server has dropped or queued the image."""
    if not all(each.finish_reason == "error" and not each.token_ids for each in output.outputs):
        return False
    hashes = [each for hashes in prompt["mm_hashes"].values() for each in hashes]
    renderer = engine.renderer
    # Since 0.33, which has this method, the next prompt's thread drops what is queued. The queue is read first: an
    # image leaves it before it leaves the cache.
    queued = renderer._pending_mm_cache_invalidations if hasattr(renderer, _QUEUE) else ()
    return any(each in queued for each in hashes) or not all(renderer.mm_processor_cache.is_cached(hashes))

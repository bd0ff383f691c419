"""A request whose images the engine turns out not to have is sent again with them, instead of failing.

The API server leaves out of a request the processed images that the engine has in its cache, and takes for granted
that it has what was once processed. Where that request never got there, because its client left meanwhile or its
prompt turned out too long, vLLM (0.29 to 0.32) answers the next one with such an image with HTTP 500, for clients
to retry.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from promprune_vllm.engine.keys import AGAIN

logger = logging.getLogger("vllm.promprune")


def remember_prompt(original: Any) -> Any:
    """Keep with a prompt what it takes to process it again, but only where something was left out of it."""

    async def process(self: Any, prompt: Any, **kwargs: Any) -> Any:
        engine_input = await original(self, prompt, **kwargs)
        items = (engine_input.get("mm_kwargs") or {}).values()
        if any(item is None for each in items for item in each):
            engine_input[AGAIN] = partial(original, self, prompt, **{**kwargs, "skip_mm_cache": True})
        return engine_input

    return process


def send_again(original: Any) -> Any:
    """Wrap the way to the engine."""

    def generate(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        again = prompt.pop(AGAIN, None) if isinstance(prompt, dict) else None
        if again is None:
            found: AsyncIterator[Any] = original(self, prompt, *args, **kwargs)
            return found
        return resend(self, again, prompt, *args, **kwargs)

    async def resend(self: Any, again: Any, prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(original(self, prompt, *args, **kwargs)) as outputs:
            async for output in outputs:
                if again is not None and _missed(self, prompt, output):
                    break
                again = None  # lets go of the images
                yield output
            else:
                return
        logger.info("An image was not with the engine any more; the request is sent again with all of its images.")
        async with aclosing(original(self, {**prompt, **await again()}, *args, **kwargs)) as outputs:
            async for output in outputs:
                yield output

    return generate


def _missed(engine: Any, prompt: Any, output: Any) -> bool:
    """Return whether this is the engine's word that it lacks an image: the API server has forgotten it by now."""
    if not all(each.finish_reason == "error" and not each.token_ids for each in output.outputs):
        return False
    hashes = [each for hashes in prompt["mm_hashes"].values() for each in hashes]
    return not all(engine.renderer.mm_processor_cache.is_cached(hashes))

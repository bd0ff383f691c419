"""Observes how long clients wait for the first token, with pruning and without.

vLLM's own histogram of this time cannot be split by what was pruned. An answer that is not streamed leaves as a
whole, so the wait is what remains of the time until it is complete without the time between its first token and
its last one, which vLLM measures. If an answer was asked for again, the first try is part of the wait.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from promprune_vllm.engine.api_server.pruning_plan import Summary
from promprune_vllm.engine.keys import COUNTED, SUMMARY
from promprune_vllm.metrics.recorder import Recorder, recorder


def observe_first_tokens(original: Any) -> Any:
    """Wrap the call of the engine: observe the wait for the first token of a prompt with images or videos."""

    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
        started = time.monotonic()
        outputs = original(self, prompt, sampling_params, request_id=request_id, **kwargs)
        summary: Summary | None = prompt.get(SUMMARY) if isinstance(prompt, dict) else None
        if summary is None or prompt.get(COUNTED):  # the latter is no client's: an audit
            return outputs
        metrics = recorder(self.model_config.served_model_name)
        return _observed(outputs, started, summary.kept < summary.total, metrics)

    return generate


async def _observed(outputs: Any, started: float, pruned: bool, metrics: Recorder) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            times = output.metrics if output.finished else None
            if times is not None and times.first_token_ts:  # none if it failed, or vLLM keeps no statistics
                decoding = times.last_token_ts - times.first_token_ts
                metrics.first_token(pruned, time.monotonic() - started - decoding)
            yield output

"""Counts prompts once the engine accepts them: a prompt that is refused saves nothing."""

from __future__ import annotations

from typing import Any

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD, VIDEO
from promprune_vllm.engine.api_server.pruning_plan import Summary
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.compat import verdict
from promprune_vllm.engine.keys import COUNTED, SAVINGS, SUMMARY, TRIES
from promprune_vllm.errors import BudgetError
from promprune_vllm.metrics.recorder import Build, expose, recorder


def start(renderer: Any) -> None:
    """Log whether the model can be pruned, and show our metrics on this process's ``/metrics`` from the start.

    This cannot happen in the renderer's constructor: other programs create renderers with partial configurations.
    """
    import vllm

    from promprune_vllm import __version__
    from promprune_vllm.engine.api_server.prompt_savings import Savings
    from promprune_vllm.engine.api_server.request_hooks import log_pruning_support

    log_pruning_support(renderer)
    found = verdict.current()
    expose(
        renderer.config.model_config.served_model_name,
        Settings.from_environment().allowed,
        Build(__version__, vllm.__version__, found.tested, found.parts()),
        derived=Savings(renderer.config).supported,
    )


def start_counting(original: Any) -> Any:
    """Wrap the constructor of ``InputProcessor``: start the metrics."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        start(self.renderer)

    return init


def count_prompts(original: Any) -> Any:
    """Wrap the step that turns a processed prompt into a request: count the prompt."""

    def process_inputs(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, request_id, prompt, *args, **kwargs)
        # Without a type the prompt is not rendered yet (vLLM calls this again), or vLLM only checks options.
        if isinstance(prompt, dict) and "type" in prompt and not prompt.get(COUNTED):
            _refuse_long_videos(self, prompt.get(SUMMARY))
            prompt[COUNTED] = True  # a prompt may be sent twice
            if TRIES in prompt:  # counted later, if it is the try that is answered
                prompt[TRIES].accept()
            else:
                count(self, prompt)
        return request

    return process_inputs


def _refuse_long_videos(input_processor: Any, summary: Summary | None) -> None:
    """Refuse pruned videos that the vision encoder was not profiled for: vLLM sees only how many tokens are kept.

    Images cannot be larger than those that vLLM profiles.

    Raises:
        VLLMValidationError: A video has more tokens before pruning than vLLM would take of one.
    """
    limit = input_processor.mm_encoder_cache_size
    for video in summary.images if summary is not None else ():
        if video.kind == VIDEO and video.kept < video.total and video.total > limit:
            with refusing(input_processor.model_config):
                raise BudgetError(
                    f"A video of {video.total} tokens is too long, whatever {FIELD} keeps of it: the vision "
                    f"encoder takes at most {limit} tokens at once. Send fewer or smaller frames, or start the "
                    "server with a larger --max-model-len or --max-num-batched-tokens.",
                    reason="limits",
                )


def count(input_processor: Any, engine_input: dict[str, Any]) -> None:
    """Count a prompt that the engine has accepted."""
    metrics = recorder(input_processor.model_config.served_model_name)
    summary: Summary | None = engine_input.get(SUMMARY)
    if summary is None:
        metrics.outcome("full" if engine_input["type"] == "multimodal" else "text")
        return
    after = len(engine_input["prompt_token_ids"])
    before = after + sum(image.total - image.kept for image in summary.images)
    items = [
        (image.kind, image.total, image.kept, cached)
        for image, cached in zip(summary.images, summary.cached, strict=True)
    ]
    metrics.prompt(summary.method, items, _savings(input_processor).of_prompt(before, after))
    if summary.form is not None:
        metrics.budget(summary.form)


def _savings(input_processor: Any) -> Any:
    from promprune_vllm.engine.api_server.prompt_savings import Savings

    if SAVINGS not in input_processor.__dict__:
        setattr(input_processor, SAVINGS, Savings(input_processor.vllm_config))
    return input_processor.__dict__[SAVINGS]

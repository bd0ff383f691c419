"""Prompts on their way to the engine: their images are recorded for the reply, wherever they were processed.

Most prompts were processed by this server. Those of ``/inference/v1/generate`` with ``features`` were processed
by a render server, and carry what was counted there in the fields of each image. A client could have changed
them, so they are checked here: in the engine a wrong one would be an error of the server.
"""

from __future__ import annotations

from typing import Any

import torch

from promprune_vllm.config import Settings
from promprune_vllm.core.budget import FIELD, METHOD_FIELD
from promprune_vllm.engine.api_server import request_fields
from promprune_vllm.engine.api_server.pruning_plan import MAX_TEXT_TOKENS, ImagePlan, Summary, record_prompt_images
from promprune_vllm.engine.api_server.refusals import refusing
from promprune_vllm.engine.keys import COUNTS, SUMMARY, TEXT
from promprune_vllm.errors import BudgetError
from promprune_vllm.server.usage import current_usage

_NEXT_STEP = (
    "Send the features as the render server made them, and give both servers the same PROMPRUNE_* settings."
)


def record_prompt(original: Any) -> Any:
    """Wrap a plain function, so that images are recorded before a stream's headers leave."""

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs["prompt"] if "prompt" in kwargs else args[0]
        if isinstance(prompt, dict) and prompt.get("type") == "multimodal":
            # Where images are recorded already, a beam of this very request is on its way, without its summary.
            if SUMMARY not in prompt and current_usage() is None:
                _adopt(prompt, self.model_config)
            record_prompt_images(prompt)
        return original(self, *args, **kwargs)

    return start


def _adopt(prompt: dict[str, Any], model_config: Any) -> None:
    """Add the summary that our processor would have added, from the fields of the images."""
    items = prompt["mm_kwargs"].get("image")
    if not items:
        return  # a video, say, which this server has processed itself
    with refusing(model_config):
        _refuse_fields()
        if any(item is None for item in items):
            return  # an image that the engine has already: what was counted for it is not known here
        settings = Settings.from_environment()
        vocabulary = int(model_config.get_vocab_size())
        places = prompt["mm_placeholders"]["image"]
        images = tuple(
            _plan(item, place.length, settings, vocabulary) for item, place in zip(items, places, strict=True)
        )
    method = settings.allowed[next((image.method for image in images if image.kept < image.total), 0)]
    prompt[SUMMARY] = Summary(images, (False,) * len(images), method, None)


def _refuse_fields() -> None:
    for name in (FIELD, METHOD_FIELD):
        if request_fields.read(None, name) is not None:
            raise BudgetError(
                f"{name} comes too late for images that are sent as features: the render server has processed "
                f"them. Send {name} with the request to its render route.",
                param=name,
                reason="unsupported",
            )


def _plan(item: Any, length: int, settings: Settings, vocabulary: int) -> ImagePlan:
    """Return what was planned for an image, checked."""
    if COUNTS not in item:  # rendered without this plugin
        return ImagePlan(length, length)
    counts, text = item[COUNTS].data, item[TEXT].data if TEXT in item else torch.empty(0, dtype=torch.int64)
    if not _is_ids(counts) or counts.shape != (3,) or not _is_ids(text) or text.ndim != 1:
        raise _unusable(f"{COUNTS} or {TEXT} has another shape or type")
    seen, kept, method = counts.tolist()
    if not 1 <= kept <= seen or kept != length:
        raise _unusable(f"they say that {kept} of {seen} tokens are kept, and the placeholder has {length}")
    if not 0 <= method < len(settings.allowed):
        raise _unusable(f"they name method {method} of the {len(settings.allowed)} that this server allows")
    if len(text) > MAX_TEXT_TOKENS or not all(0 <= token < vocabulary for token in text.tolist()):
        raise _unusable(f"their text has {len(text)} tokens, or tokens that the model does not have")
    if kept < seen and not settings.policy().allows(kept, seen):
        raise _unusable(f"{kept} of {seen} tokens are outside this server's limits")
    return ImagePlan(seen, kept, method)


def _is_ids(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64


def _unusable(why: str) -> BudgetError:
    return BudgetError(f"The features of an image cannot be used: {why}. {_NEXT_STEP}", param="features")

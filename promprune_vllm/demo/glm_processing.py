"""Input processing of the GLM-V demo models: special tokens, chat template, processor."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from promprune_vllm.demo.processing import FIRST_BYTE_ID, byte_tokenizer, content_parts

# Same roles and ids as in `processing`: pad, begin, end (an answer ends where the user's turn starts), image.
SPECIAL_TOKENS = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|image|>")
MORE_TOKENS: Mapping[str, str] = MappingProxyType(
    {
        "video_token": "<|video|>",
        "image_start_token": "<|begin_of_image|>",
        "image_end_token": "<|end_of_image|>",
        "video_start_token": "<|begin_of_video|>",
        "video_end_token": "<|end_of_video|>",
        "start_token": "<sop>",
        "system_token": "<|system|>",
        "assistant_token": "<|assistant|>",
    }
)
_FIRST = FIRST_BYTE_ID + 256
VIDEO_ID, IMAGE_START_ID, IMAGE_END_ID, VIDEO_START_ID, VIDEO_END_ID = range(_FIRST, _FIRST + 5)

_IMAGE, _VIDEO = "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
CHAT_TEMPLATE = """\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
  {{- '<|' + message['role'] + '|>\\n' }}
  {%- if message['content'] is string %}{{- message['content'] }}
  {%- else %}
(parts)
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}""".replace(
    "(parts)", content_parts(_IMAGE, _VIDEO)
)

# Limits of visual tokens per image, so that several photos fit into a short context.
_MIN_TOKENS, _MAX_TOKENS = 4, 256


def glm_processor(family: str, patch_px: int, merge: int, *, max_tokens: int) -> Any:
    """Return the processor of the published checkpoints: a ``Glm4vProcessor``, or GLM-OCR's ``Glm46VProcessor``.

    Args:
        family: A model type.
        patch_px: Width and height of a patch in pixels.
        merge: Patches per visual token along each axis.
        max_tokens: Maximum length of a prompt in tokens.
    """
    import transformers

    name = "Glm46V" if family == "glm_ocr" else "Glm4v"
    geometry: dict[str, Any] = {"patch_size": patch_px, "merge_size": merge, "temporal_patch_size": 2}
    token_px = 2 * (patch_px * merge) ** 2  # of two frames: an image counts as two
    size = {"shortest_edge": _MIN_TOKENS * token_px, "longest_edge": _MAX_TOKENS * token_px}  # volumes, in pixels
    return getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, f"{name}ImageProcessor")(size=size, **geometry),
        tokenizer=byte_tokenizer(
            max_tokens, special=SPECIAL_TOKENS, more=MORE_TOKENS, chat_template=CHAT_TEMPLATE
        ),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(
            size=size, max_image_size={"longest_edge": size["longest_edge"]}, **geometry
        ),
        chat_template=CHAT_TEMPLATE,
    )

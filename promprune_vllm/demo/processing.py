"""Input processing of the LLaVA demo models: byte tokenizer, chat template, image preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(len(SPECIAL_TOKENS))
ROLE_IDS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
FIRST_BYTE_ID = len(SPECIAL_TOKENS)  # byte b has the id FIRST_BYTE_ID + b
VOCAB_SIZE = 320  # at least 260 tokens, padded to a multiple of 64 by `unused_tokens`

# Images first, as LLaVA-1.5 was trained. The template writes <s> and the tokenizer never adds one, so there is
# exactly one whether or not the caller asks for special tokens. `IMAGES_OPEN` is a placeholder for the images.
IMAGES_OPEN = "(images)"
CHAT_FRAME = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}{{- 'USER: ' }}
  {%- elif message['role'] == 'assistant' %}{{- 'ASSISTANT: ' }}
  {%- endif %}
  {%- if message['content'] is string %}{{- message['content'] }}
  {%- else %}
(images)
    {%- for part in message['content'] %}
      {%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
    {%- endfor %}
  {%- endif %}
  {{- eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
CHAT_TEMPLATE = CHAT_FRAME.replace(
    IMAGES_OPEN,
    """\
    {%- for part in message['content'] %}
      {%- if part['type'] in ('image', 'image_url') %}{{- '<image>\\n' }}{%- endif %}
    {%- endfor %}""",
)

_PARTS = """\
    {%- for part in message['content'] %}
      {%- if part['type'] in ('image', 'image_url') %}{{- '(image)' }}
      {%- elif part['type'] in ('video', 'video_url') %}{{- '(video)' }}
      {%- elif part['type'] == 'text' %}{{- part['text'] }}
      {%- endif %}
    {%- endfor %}"""
_CHATML = """\
{%- for message in messages %}
  {{- '<|im_start|>' + message['role'] + '\\n' }}
  {%- if message['content'] is string %}{{- message['content'] }}
  {%- else %}
(parts)
  {%- endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def content_parts(image: str, video: str) -> str:
    """Return the part of a chat template that writes a message's parts in the given order.

    Args:
        image, video: What stands for one in the prompt, as in a Jinja string.
    """
    return _PARTS.replace("(image)", image).replace("(video)", video)


def chatml(image: str, video: str) -> str:
    """Return the chat template of Qwen, and of models with its language model; see ``content_parts``."""
    return _CHATML.replace("(parts)", content_parts(image, video))


def unused_tokens(first: int, size: int) -> dict[str, int]:
    """Return special tokens for the ids from `first` to `size - 1`, which no model here was trained on.

    A model can emit every id of its output layer, and each needs a name: vLLM's server crashes on an id without
    one (docs/upstream.md). As special tokens they do not show in answers.
    """
    return {f"<unused_{i}>": i for i in range(first, size)}


def byte_tokenizer(
    max_tokens: int,
    *,
    special: tuple[str, ...] = SPECIAL_TOKENS,
    more: Mapping[str, str] = MappingProxyType({}),
    chat_template: str = CHAT_TEMPLATE,
    image_name: str = "image_token",
) -> Any:
    """Return a `PreTrainedTokenizerFast` of `VOCAB_SIZE` tokens: one per byte of text, one per special token.

    Args:
        max_tokens: Maximum length of a text in tokens.
        special: The tokens of `PAD_ID`, `BOS_ID`, `EOS_ID` and `IMAGE_ID`.
        more: Special tokens with ids from `FIRST_BYTE_ID + 256`, by their attribute name on the tokenizer.
        chat_template: Jinja source.
        image_name: Attribute name of the image token.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary([f"<0x{byte:02X}>" for byte in range(256)], special, more)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(_special_tokens(vocabulary))
    options = _options(max_tokens, special, more, chat_template, image_name)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def byte_level_tokenizer(
    max_tokens: int, *, special: tuple[str, ...], more: Mapping[str, str], chat_template: str
) -> Any:
    """Return the same as a `Qwen3_5Tokenizer`: transformers takes that class for Qwen3.5, whatever was saved.

    Its tokens for bytes have the names that GPT-2 gave them.
    """
    from transformers import Qwen3_5Tokenizer

    vocabulary = _vocabulary(_gpt2_names(), special, more)
    options = _options(max_tokens, special, more, chat_template)
    tokenizer = Qwen3_5Tokenizer(vocab=vocabulary, merges=[], **options)
    tokenizer.backend_tokenizer.add_special_tokens(_special_tokens(vocabulary))
    return tokenizer


def _vocabulary(of_bytes: list[str], special: tuple[str, ...], more: Mapping[str, str]) -> dict[str, int]:
    """Return all `VOCAB_SIZE` tokens: special ones, one per byte, more special ones, unused ones."""
    vocabulary = {token: i for i, token in enumerate((*special, *of_bytes, *more.values()))}
    return vocabulary | unused_tokens(len(vocabulary), VOCAB_SIZE)


def _special_tokens(vocabulary: Mapping[str, int]) -> list[Any]:
    """Return the tokens of a vocabulary that are no bytes."""
    from tokenizers import AddedToken

    named = (token for token, i in vocabulary.items() if not FIRST_BYTE_ID <= i < FIRST_BYTE_ID + 256)
    return [AddedToken(token, special=True, normalized=False) for token in named]


def _options(
    max_tokens: int,
    special: tuple[str, ...],
    more: Mapping[str, str],
    chat_template: str,
    image_name: str = "image_token",
) -> dict[str, Any]:
    pad, bos, eos, image = special
    return {
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "extra_special_tokens": {image_name: image, **more},
        "chat_template": chat_template,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
    }


def _gpt2_names() -> list[str]:
    """Return a printable character for each byte: itself, or one behind all bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def unprintable_ids() -> list[int]:
    """Return all ids except those of the 95 printable ASCII characters."""
    return [token for token in range(VOCAB_SIZE) if not 0x20 <= token - FIRST_BYTE_ID < 0x7F]


def llava_processor(image_px: int, patch_px: int, tokenizer: Any, *, class_token: bool = True) -> Any:
    """Return a `LlavaProcessor`, with CLIP's preprocessing if the tower has a class token, else SigLIP's.

    Args:
        image_px: Width and height of the tower's input in pixels.
        patch_px: Width and height of a patch in pixels.
        tokenizer: Tokenizer with a chat template.
        class_token: Whether the tower has one.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor

    side = {"height": image_px, "width": image_px}
    if class_token:
        images = CLIPImageProcessor(size={"shortest_edge": image_px}, crop_size=side)
    else:
        images = SiglipImageProcessor(size=side)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_px,
        vision_feature_select_strategy="default" if class_token else "full",
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=int(class_token),
    )


def llava_next_processor(tile_px: int, patch_px: int, grids: list[list[int]], *, max_tokens: int) -> Any:
    """Return a `LlavaNextProcessor` for CLIP; the whole image and its crops are tiles of `tile_px` squared.

    Args:
        tile_px: Width and height of a tile in pixels.
        patch_px: Width and height of a patch in pixels.
        grids: Sizes (height, width) in pixels that an image may be resized to.
        max_tokens: Maximum length of a prompt in tokens.
    """
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    side = {"height": tile_px, "width": tile_px}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": tile_px}, crop_size=side, image_grid_pinpoints=grids
        ),
        tokenizer=byte_tokenizer(max_tokens),
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )

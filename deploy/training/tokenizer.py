"""Input processing of the trained model: known words are single tokens, other text is split into bytes."""

from __future__ import annotations

from typing import Any

from promprune_vllm.demo import processing
from promprune_vllm.demo.processing import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, SPECIAL_TOKENS
from promprune_vllm.demo.scenes.record import COLOURS, PATCH, PIXELS, PLURALS, QUARTERS, SHAPES

USER, ASSISTANT = "USER:", "ASSISTANT:"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
VOCAB_SIZE = 384  # rows of the embedding; a multiple of 64
MAX_TOKENS = 4096  # positions of the language model
_SPACE = "▁"
_WORDS = (
    *("is", "there", "a", "how", "many", "are", "shapes", "what", "colour", "shape", "the", "digit", "on", "card"),
    *("where", "left", "right", "above", "below", "or", "of", "it", "last", "which", "image", "shows", "plate"),
    *("yes", "no", "in", "picture", "?", ".", ",", "!", ":"),
    *map(str, range(10)),
    *COLOURS,
    *SHAPES,
    *PLURALS.values(),
    *QUARTERS,
    *ORDINALS,
)

# LLaVA-1.5's format, images first. Several images are numbered, so that a question can refer to them; a single one
# is not. The template writes <s>, and the tokenizer never adds one.
CHAT_TEMPLATE = f"{{%- set ordinals = {list(ORDINALS)!r} %}}\n" + processing.CHAT_FRAME.replace(
    processing.IMAGES_OPEN,
    """\
    {%- set images = message['content'] | selectattr('type', 'in', ['image', 'image_url']) | list %}
    {%- for image in images %}
      {%- if images | length > 1 and loop.index0 < ordinals | length %}
        {{- ordinals[loop.index0] + ' ' }}
      {%- endif %}
      {{- '<image>\\n' }}
    {%- endfor %}""",
)


def tokenizer() -> Any:
    """Return a `PreTrainedTokenizerFast` of lower-case words; any other text becomes one token per byte."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        pad_token=SPECIAL_TOKENS[PAD_ID],
        bos_token=SPECIAL_TOKENS[BOS_ID],
        eos_token=SPECIAL_TOKENS[EOS_ID],
        extra_special_tokens={"image_token": SPECIAL_TOKENS[IMAGE_ID]},
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _backend() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for token in (USER, ASSISTANT, _SPACE, *(_SPACE + word for word in _WORDS)):
        vocabulary.setdefault(token, len(vocabulary))
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    if len(vocabulary) > VOCAB_SIZE:
        raise ValueError(f"{len(vocabulary)} tokens do not fit in {VOCAB_SIZE} rows")
    unused = processing.unused_tokens(len(vocabulary), VOCAB_SIZE)
    backend = Tokenizer(models.BPE(vocab=vocabulary | unused, merges=[], byte_fallback=True, ignore_merges=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("color", "colour"), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[?.,!:]"), "isolated"),
            pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1, right=0),
        ]
    )
    # They strip the spaces around them, so that the question's first word directly follows <image>.
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, lstrip=True, rstrip=True) for t in SPECIAL_TOKENS]
    )
    backend.add_tokens([AddedToken(t, normalized=False, lstrip=True, rstrip=True) for t in (USER, ASSISTANT)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unused])
    return backend


def processor() -> Any:
    """Return a `LlavaProcessor` with CLIP's preprocessing at 336 px."""
    return processing.llava_processor(PIXELS, PATCH, tokenizer())

"""A small LLaVA-1.5 with seeded random weights, built on the spot: no real weights are small enough to ship.

Its shape is real (CLIP tower at 336 px / patch 14, 576 visual tokens taken from the last layer but one without
the class token, a two-layer projector, a Llama), so vLLM serves it by its own LLaVA code and pruning saves
measurable prefill. Its answers mean nothing; what its visual tokens have in common they have from the photograph.

The weights are a function of the spec alone: the same spec gives the same bytes, on any machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

STAMP = "promprune_demo.json"  # what was asked for; a directory that holds this very text is complete
FORMAT_VERSION = 1  # raise it when the same spec starts to give other files

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")  # ids 0 to 3; byte b has the id 4 + b
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 320  # 260 tokens, padded to a multiple of 64

# Images first, as LLaVA-1.5 was trained. The template writes <s> and the tokenizer never adds one by itself, so
# there is exactly one, whether or not the caller asks the tokenizer for special tokens.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}{{- 'USER: ' }}{% elif message['role'] == 'assistant' %}{{- 'ASSISTANT: ' }}{% endif %}
  {%- if message['content'] is string %}{{- message['content'] }}
  {%- else %}
    {%- for part in message['content'] if part['type'] in ('image', 'image_url') %}{{- '<image>\\n' }}{% endfor %}
    {%- for part in message['content'] if part['type'] == 'text' %}{{- part['text'] }}{% endfor %}
  {%- endif %}
  {{- eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""

# transformers 5 names -> the names of published LLaVA-1.5 checkpoints. vLLM 0.32 wants the `vision_model` level,
# which save_pretrained leaves out; transformers reads both.
_CHECKPOINT_NAMES = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

# Standard deviation of a weight; the first match wins. Matrices are scaled by 1/sqrt(fan_in), so that a tiny model
# behaves like a larger one. With the usual 0.02 everywhere, attention would be uniform and every photo alike.
_ABSOLUTE_STD = (
    (r"class_embedding$|embed_tokens\.weight$", 1.0),
    (r"position_embedding\.weight$", 0.3),
    (r"\.bias$", 0.05),
)
_GAIN = (
    (r"vision_tower\..*\.[qk]_proj\.weight$", 1.5),
    (r"\.(o_proj|out_proj|down_proj|fc2)\.weight$", 0.5),
    (r"", 1.0),
)


@dataclass(frozen=True, slots=True)
class DemoModelSpec:
    """All that decides the bytes of a demo model. vLLM's CPU attention takes language heads of 32, 64, 80, ..."""

    seed: int = 0
    vision: Literal["clip", "siglip"] = "clip"  # SigLIP has no class token: its `visual_tokens` are all it has
    image_px: int = 336
    patch_px: int = 14
    vision_hidden: int = 128
    vision_heads: int = 4
    vision_mlp: int = 512
    vision_layers: int = 5  # the last one is in the file, as in every LLaVA, but no feature is read from it
    hidden: int = 384
    heads: int = 6
    mlp: int = 1024
    layers: int = 6
    max_tokens: int = 4096  # positions of the language model
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.image_px % self.patch_px:
            raise ValueError(f"image_px={self.image_px} is no multiple of patch_px={self.patch_px}")
        for width, heads in ((self.vision_hidden, self.vision_heads), (self.hidden, self.heads)):
            if width % heads:
                raise ValueError(f"a width of {width} cannot be split over {heads} heads")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one unpruned image: one per patch."""
        return (self.image_px // self.patch_px) ** 2


DEFAULT_SPEC = DemoModelSpec()
_TEXT_SPEC = DemoModelSpec(hidden=64, heads=2, mlp=128, layers=2)


def find_or_build_demo_model(spec: DemoModelSpec = DEFAULT_SPEC) -> Path:
    """The directory of this model in the cache of the user, built (some seconds) if it is not there yet."""
    if own := os.environ.get("PROMPRUNE_CACHE"):
        cache = Path(own)
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promprune"
    digest = hashlib.sha256(_stamp("llava", spec).encode()).hexdigest()[:12]
    return build_demo_model(cache / f"demo-llava-{digest}", spec)


def build_demo_model(directory: Path, spec: DemoModelSpec = DEFAULT_SPEC) -> Path:
    """Make `directory` a checkpoint of `spec` that vLLM and transformers load; at once if it already is one."""

    def write(target: Path) -> None:
        from transformers import LlavaForConditionalGeneration

        config = _llava_config(spec)
        _write_weights(target, LlavaForConditionalGeneration, config, spec)
        _processor(spec).save_pretrained(target)

    return _publish(directory, _stamp("llava", spec), write)


def build_text_model(directory: Path) -> Path:
    """Make `directory` a tiny text-only Llama with the same tokenizer: a model with nothing to prune."""

    def write(target: Path) -> None:
        from transformers import LlamaForCausalLM

        _write_weights(target, LlamaForCausalLM, _llama_config(_TEXT_SPEC), _TEXT_SPEC)
        _tokenizer(_TEXT_SPEC).save_pretrained(target)

    return _publish(directory, _stamp("llama", _TEXT_SPEC), write)


def _stamp(kind: str, spec: DemoModelSpec) -> str:
    """The text that identifies a built directory."""
    return json.dumps({"format": FORMAT_VERSION, "kind": kind, "spec": asdict(spec)}, indent=2) + "\n"


def _holds(directory: Path, stamp: str) -> bool:
    file = directory / STAMP
    return file.is_file() and file.read_text() == stamp


def _publish(directory: Path, stamp: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary sibling, then rename it: nobody ever sees half a model."""
    if _holds(directory, stamp):
        return directory
    if directory.exists() and not (directory / STAMP).is_file() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} holds something else than a demo model; give an empty or a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as workshop:
        fresh = Path(workshop) / "fresh"  # has the usual permissions, which the temporary directory has not
        fresh.mkdir()
        write(fresh)
        (fresh / STAMP).write_text(stamp)
        if directory.exists():
            directory.rename(Path(workshop) / "old")
        try:
            fresh.rename(directory)
        except OSError:
            if not _holds(directory, stamp):  # otherwise another process was faster with the same model
                raise
    return directory


def _llama_config(spec: DemoModelSpec) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_tokens,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype=spec.dtype,
    )


def _llava_config(spec: DemoModelSpec) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

    sizes = {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_mlp,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.image_px,
        "patch_size": spec.patch_px,
    }
    clip = spec.vision == "clip"
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(**sizes) if clip else SiglipVisionConfig(**sizes, vision_use_head=False),
        text_config=_llama_config(spec),
        image_token_index=IMAGE_ID,
        image_seq_length=spec.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype=spec.dtype,
    )


def _write_weights(target: Path, model_class: Any, config: Any, spec: DemoModelSpec) -> None:
    """Write config and weights of a model of which only names and shapes are ever made."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    with torch.device("meta"):
        shapes = {name: p.shape for name, p in model_class(config).named_parameters()}
    if config.model_type == "llava":
        shapes = {_checkpoint_name(name): shape for name, shape in shapes.items()}
    dtype = getattr(torch, spec.dtype)
    weights = {name: _random_weight(name, tuple(shape), spec.seed).to(dtype) for name, shape in shapes.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(target)


def _checkpoint_name(name: str) -> str:
    for ours, published in _CHECKPOINT_NAMES:
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    raise ValueError(f"no checkpoint name is known for the parameter {name}")


def _random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The weight `name` of this seed, float32, whatever other weights the model has and in whatever order."""
    import torch

    if re.search(r"norm\w*\.weight$", name):
        return torch.ones(shape)
    std = next((std for pattern, std in _ABSOLUTE_STD if re.search(pattern, name)), None)
    if std is None:
        gain = next(gain for pattern, gain in _GAIN if re.search(pattern, name))
        std = gain / math.sqrt(math.prod(shape[1:]))
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    # Uniform, not normal: torch.randn uses logarithms, whose last bit depends on the CPU; torch.rand does not.
    weight = (torch.rand(shape, generator=generator) - 0.5) * (std * math.sqrt(12.0))
    if name.endswith("lm_head.weight"):
        weight[_unprintable_ids()] = 0.0
    return weight


def _unprintable_ids() -> list[int]:
    """Ids whose logit is held at 0, below the largest of 95 random ones: greedy answers are printable and never end."""
    printable = {len(SPECIAL_TOKENS) + byte for byte in range(0x20, 0x7F)}
    return [token for token in range(VOCAB_SIZE) if token not in printable]


def _tokenizer(spec: DemoModelSpec) -> Any:
    """One token per UTF-8 byte, no merges; `<image>` and its like are single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, image = SPECIAL_TOKENS
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *_byte_alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        chat_template=CHAT_TEMPLATE,
        model_max_length=spec.max_tokens,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> Iterable[str]:
    """The character that stands for byte 0, 1, ... 255 in the byte-level vocabularies of the tokenizers library."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    character = {byte: chr(byte) for byte in own} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    return (character[byte] for byte in range(256))


def _processor(spec: DemoModelSpec) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor

    side = {"height": spec.image_px, "width": spec.image_px}
    clip = spec.vision == "clip"
    images = (
        CLIPImageProcessor(size={"shortest_edge": spec.image_px}, crop_size=side)
        if clip
        else SiglipImageProcessor(size=side)
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=_tokenizer(spec),
        patch_size=spec.patch_px,
        vision_feature_select_strategy="default" if clip else "full",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1 if clip else 0,  # the class token
    )

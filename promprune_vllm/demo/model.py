"""Builds a small LLaVA-1.5 with seeded random weights, since real weights are too large to ship.

Its structure is real (CLIP tower at 336 px / patch 14, 576 visual tokens from the second to last layer without the
class token, a two-layer projector, a Llama), so vLLM serves it with its own LLaVA code and pruning saves
measurable prefill. Its answers are meaningless, but they depend on the image, as its visual tokens do.

The weights depend only on the spec: the same spec gives the same bytes on any machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from promprune_vllm.demo import processing
from promprune_vllm.demo.random_weights import DType, random_weights

if TYPE_CHECKING:
    import torch

STAMP = "promprune_demo.json"  # the spec; a directory whose stamp equals the requested one is complete
FORMAT_VERSION = 2  # increase it when the same spec starts to give different files

TINY_TEXT: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": processing.VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
)
"""Sizes of the language model of the tiny checkpoints that are no LLaVA; a head has 32 channels."""


@dataclass(frozen=True, slots=True)
class DemoModelSpec:
    """Everything that determines the bytes of a demo model. vLLM's CPU attention needs heads of 32, 64, 80, ..."""

    seed: int = 0
    vision: Literal["clip", "siglip"] = "clip"  # SigLIP has no class token
    image_px: int = 336
    patch_px: int = 14
    vision_hidden: int = 128
    vision_heads: int = 4
    vision_mlp: int = 512
    vision_layers: int = 5  # the last one is in the file, as in every LLaVA, but its output is not used
    hidden: int = 384
    heads: int = 6
    mlp: int = 1024
    layers: int = 6
    max_tokens: int = 4096  # positions of the language model
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        if self.image_px % self.patch_px:
            raise ValueError(f"image_px={self.image_px} is not a multiple of patch_px={self.patch_px}")
        for width, heads in ((self.vision_hidden, self.vision_heads), (self.hidden, self.heads)):
            if width % heads:
                raise ValueError(f"a width of {width} cannot be split over {heads} heads")

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an unpruned image: one per patch."""
        return (self.image_px // self.patch_px) ** 2


DEFAULT_SPEC = DemoModelSpec()
_TEXT_SPEC = DemoModelSpec(hidden=64, heads=2, mlp=128, layers=2)


def find_or_build_demo_model(spec: DemoModelSpec = DEFAULT_SPEC) -> Path:
    """Return this model's directory in the user's cache; build it first (a few seconds) if it is missing."""
    digest = hashlib.sha256(stamp("llava", asdict(spec)).encode()).hexdigest()[:12]
    return build_demo_model(cache_directory() / f"demo-llava-{digest}", spec)


def cache_directory() -> Path:
    """Return the directory of the user's demo models; it may not exist yet."""
    if own := os.environ.get("PROMPRUNE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promprune"


def build_demo_model(directory: Path, spec: DemoModelSpec = DEFAULT_SPEC, *, weights: bool = True) -> Path:
    """Write a checkpoint of `spec` for vLLM and transformers; do nothing if `directory` already has it.

    Args:
        directory: New, empty, or an earlier demo model, which is replaced.
        spec: What to write.
        weights: Whether to write weights too. Without, vLLM serves it with `--load-format dummy`.
    """

    def write(target: Path) -> None:
        from transformers import LlavaForConditionalGeneration

        config = llava_config(spec)
        if weights:
            write_weights(target, LlavaForConditionalGeneration, config, spec.seed, spec.dtype)
        else:
            save_config(target, config)
        tokenizer = processing.byte_tokenizer(spec.max_tokens)
        processing.llava_processor(
            spec.image_px, spec.patch_px, tokenizer, class_token=spec.vision == "clip"
        ).save_pretrained(target)

    return publish(directory, stamp("llava" if weights else "llava without weights", asdict(spec)), write)


def build_text_model(directory: Path) -> Path:
    """Write a tiny text-only Llama with the same tokenizer: a model with nothing to prune."""

    def write(target: Path) -> None:
        from transformers import LlamaForCausalLM

        write_weights(target, LlamaForCausalLM, llama_config(_TEXT_SPEC), _TEXT_SPEC.seed, _TEXT_SPEC.dtype)
        processing.byte_tokenizer(_TEXT_SPEC.max_tokens).save_pretrained(target)

    return publish(directory, stamp("llama", asdict(_TEXT_SPEC)), write)


def stamp(kind: str, spec: Mapping[str, Any]) -> str:
    """Return the text that identifies a built directory: everything that determines its files."""
    return json.dumps({"format": FORMAT_VERSION, "kind": kind, "spec": spec}, indent=2) + "\n"


def _has_stamp(directory: Path, text: str) -> bool:
    file = directory / STAMP
    return file.is_file() and file.read_text() == text


def publish(directory: Path, text: str, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary sibling directory, then rename it, replacing another demo model if any.

    Does nothing if `directory` already has a stamp with this `text`. Other processes never see a partial model,
    and several processes can build the same model at once.
    """
    if _has_stamp(directory, text):
        return directory
    if directory.exists() and not (directory / STAMP).is_file() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} has files that are not a demo model; give a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        fresh = Path(scratch) / "fresh"  # with the usual permissions, unlike the temporary directory
        fresh.mkdir()
        write(fresh)
        (fresh / STAMP).write_text(text)
        try:
            if directory.exists() and not _has_stamp(directory, text):
                directory.rename(Path(scratch) / "old")
            fresh.rename(directory)
        except OSError:
            if not _has_stamp(directory, text):  # else another process has just built the same model
                raise
    return directory


def llama_config(spec: DemoModelSpec) -> Any:
    """Return the configuration of a spec's language model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=processing.VOCAB_SIZE,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_tokens,
        **processing.ROLE_IDS,
        dtype=spec.dtype,
    )


def llava_config(spec: DemoModelSpec) -> Any:
    """Return the configuration of a spec's whole model."""
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
    tower = CLIPVisionConfig(**sizes) if clip else SiglipVisionConfig(**sizes, vision_use_head=False)
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=tower,
        text_config=llama_config(spec),
        image_token_index=processing.IMAGE_ID,
        image_seq_length=spec.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
        **processing.ROLE_IDS,
        dtype=spec.dtype,
    )


def write_weights(target: Path, model_class: Any, config: Any, seed: int, dtype: DType) -> None:
    """Write config and random weights of a model; the model itself is built on the meta device only."""
    save_checkpoint(target, random_weights(model_class, config, seed, dtype), config)


def save_checkpoint(target: Path, weights: dict[str, torch.Tensor], config: Any) -> None:
    """Write weights, with the names of published checkpoints, and the configuration, but no processor."""
    from safetensors.torch import save

    # Not save_file, whose file only the owner can read: a server in a container could not.
    (target / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    save_config(target, config)


def save_config(target: Path, config: Any) -> None:
    """Write the configuration of a model, and how it generates."""
    from transformers import GenerationConfig

    config.save_pretrained(target)
    GenerationConfig(**processing.ROLE_IDS).save_pretrained(target)

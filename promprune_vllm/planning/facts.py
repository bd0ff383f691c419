"""Reads a model's sizes from its configuration: weights, KV cache and arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promprune_vllm.core.savings import Decoder, read_decoder
from promprune_vllm.errors import PlanError
from promprune_vllm.planning import images, videos

_NEW_STYLE = "processor_config.json"  # transformers 5 writes the image processor's configuration into this file
_PROCESSORS = ("preprocessor_config.json", _NEW_STYLE)
_VIDEO_PROCESSORS = ("video_preprocessor_config.json", _NEW_STYLE, "preprocessor_config.json")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower.

    Args:
        layers: Number of layers that are computed.
        hidden: Width.
        mlp_weights: Weights in the MLP of one layer.
        window_patches: Patches per attention window in a windowed layer; 0 if every layer is global.
        full_layers: Number of global layers.
    """

    layers: int
    hidden: int
    mlp_weights: int
    window_patches: int
    full_layers: int

    def flops(self, patches: int) -> int:
        """Return the operations of encoding patches: two per multiply-add, without the projector."""
        local = min(self.window_patches or patches, patches)
        pairs = self.full_layers * patches**2 + (self.layers - self.full_layers) * patches * local
        return 2 * self.weights * patches + 4 * self.hidden * pairs

    @property
    def weights(self) -> int:
        """Number of weights, without the patch embedding."""
        return self.layers * (4 * self.hidden**2 + self.mlp_weights)


@dataclass(frozen=True, slots=True)
class Facts:
    """A model's sizes.

    Args:
        name: Name of its directory.
        kind: Its ``model_type``.
        config: The whole config.json.
        processor: Configuration of the image processor, or empty.
        video_processor: Configuration of the video processor, or empty.
        decoder: The language model.
        tower: The vision tower.
        parameters: Approximate number of parameters of the whole model.
        dtype_bytes: Bytes per weight.
        state_dtype_bytes: Bytes per number in the states of linear layers.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    processor: Mapping[str, Any]
    video_processor: Mapping[str, Any]
    decoder: Decoder
    tower: Tower
    parameters: int
    dtype_bytes: int
    state_dtype_bytes: int

    @property
    def state_bytes(self) -> int:
        """Bytes that one linear layer keeps for a request; 0 if the model has none."""
        linear = self.decoder.linear
        return linear.state * self.state_dtype_bytes + linear.window * self.dtype_bytes

    def block_tokens(self, wanted: int, cache_bytes: int | None = None) -> int:
        """Return the tokens of a KV-cache block, which vLLM makes long enough for a linear layer's state."""
        return wanted * max(1, -(-self.state_bytes // (wanted * self._layer_bytes(cache_bytes))))

    def chat_bytes(self, tokens: int, wanted_block: int, cache_bytes: int | None = None) -> int:
        """Return what a request of so many tokens takes in the cache: whole blocks, and one per linear layer."""
        block = self.block_tokens(wanted_block, cache_bytes)
        pages = self.decoder.attention_layers * -(-tokens // block) + self.decoder.linear.count
        return pages * block * self._layer_bytes(cache_bytes)

    def kv_bytes_per_token(self, cache_bytes: int | None = None) -> int:
        """Return the KV-cache bytes per token, over all layers and ranks."""
        return self.decoder.attention_layers * self._layer_bytes(cache_bytes)

    def _layer_bytes(self, cache_bytes: int | None) -> int:
        """Return the KV-cache bytes per token of one layer with attention: keys and values."""
        return self.decoder.kv_heads * self.decoder.head * 2 * (cache_bytes or self.dtype_bytes)

    def visual_tokens(self, width: int, height: int) -> int:
        """Return the visual tokens of an image before pruning."""
        return images.visual_tokens(self.config, self.processor, width, height)

    def encoder_flops(self, width: int, height: int) -> int:
        """Return the operations of encoding an image, which are the same at every budget."""
        return self.tower.flops(images.patches(self.config, self.processor, width, height))

    def video_grid(self, frames: int, width: int, height: int) -> tuple[int, int]:
        """Return the frames that the model has of a video, and the visual tokens of each before pruning."""
        return videos.grid(self.config, self.video_processor, frames, width, height)

    def video_tokens(self, frames: int, width: int, height: int) -> int:
        """Return the visual tokens of a video before pruning."""
        count, tokens = self.video_grid(frames, width, height)
        return count * tokens + videos.newlines(self.config)

    def video_encoder_flops(self, frames: int, width: int, height: int) -> int:
        """Return the operations of encoding a video, whose patches attend within their frame."""
        count, tokens = self.video_grid(frames, width, height)
        return count * self.tower.flops(videos.patches(self.config, tokens))


def read(model: str) -> Facts:
    """Read a model's configuration; transformers fills in missing values.

    Args:
        model: A directory, a config.json, or a Hugging Face name (two small files are downloaded).

    Raises:
        PlanError: There is no configuration, or its model type is not supported.
    """
    path = Path(model)
    try:
        config = _read_config(model)
        processor = _read_processor(model, _PROCESSORS, "image_processor")
        video_processor = _read_processor(model, _VIDEO_PROCESSORS, "video_processor")
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PlanError(
            f"{model} has no configuration to plan with ({first}). Give a model directory, its config.json, or "
            "its Hugging Face name."
        ) from error
    kind = str(config.get("model_type"))
    if kind not in images.COUNTERS:
        raise PlanError(f"{model} is of type {kind!r}; supported types are {', '.join(images.COUNTERS)}.")
    name = path.parent.name if path.is_file() else path.name
    return _facts(name, kind, config, processor, video_processor)


def _read_config(model: str) -> dict[str, Any]:
    """Return the model's configuration with every default, without running code that comes with a checkpoint."""
    from transformers import AutoConfig, PreTrainedConfig

    written, _ = PreTrainedConfig.get_config_dict(model)
    if written.get("model_type") != "internvl_chat":
        config: dict[str, Any] = AutoConfig.from_pretrained(model).to_dict()
        return config
    text = dict(written.get("llm_config") or {})
    kind = text.pop("model_type", None)
    try:
        return {**written, "text_config": AutoConfig.for_model(kind, **text).to_dict()}
    except ValueError as error:
        raise ValueError(f"transformers knows no language model of type {kind!r}") from error


def _read_processor(model: str, names: Sequence[str], part: str) -> dict[str, Any]:
    """Return the configuration of a processor, as written by any version of transformers.

    Args:
        model: See ``read``.
        names: Files that may have it; the first one that there is has it.
        part: Its name in the file with all processors.
    """
    for name in names:
        if (file := _find_file(model, name)) is not None:
            config = dict(json.loads(Path(file).read_text()))
            return dict(config[part]) if name == _NEW_STYLE and part in config else config
    return {}


def _find_file(model: str, name: str) -> str | None:
    from transformers.utils import cached_file

    path = Path(model)
    if path.is_file():
        return str(path.with_name(name)) if path.with_name(name).is_file() else None
    file: str | None = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return file


def _facts(
    name: str, kind: str, config: dict[str, Any], processor: dict[str, Any], video_processor: dict[str, Any]
) -> Facts:
    text = config.get("text_config") or config
    decoder = read_decoder(text)
    if decoder is None:
        raise PlanError(
            f"{name} cannot be planned for: its language model has layers of a kind that is not known."
        )
    tower = _tower(kind, config)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    vocabulary = int(text["vocab_size"]) * decoder.hidden * (1 if tied else 2)
    dtype = str(config.get("dtype") or text.get("dtype") or "bfloat16")
    dtype_bytes = _BYTES.get(dtype.removeprefix("torch."), 2)
    return Facts(
        name=name,
        kind=kind,
        config=config,
        processor=processor,
        video_processor=video_processor,
        decoder=decoder,
        tower=tower,
        parameters=decoder.weights + vocabulary + tower.weights + _projector(kind, config, decoder.hidden),
        dtype_bytes=dtype_bytes,
        state_dtype_bytes=_BYTES.get(str(text.get("mamba_ssm_dtype")), dtype_bytes),
    )


def _tower(kind: str, config: Mapping[str, Any]) -> Tower:
    vision = config["vision_config"]
    if kind.startswith("llava"):
        hidden, layers = int(vision["hidden_size"]), int(vision["num_hidden_layers"])
        feature = config["vision_feature_layer"]
        feature_layers = [feature] if isinstance(feature, int) else list(feature)
        used = max(layer % (layers + 1) for layer in feature_layers)  # 0 is the embeddings: -2 skips one layer
        return Tower(used, hidden, 2 * hidden * int(vision["intermediate_size"]), 0, used)
    if kind.startswith("internvl"):
        hidden, layers = int(vision["hidden_size"]), int(vision["num_hidden_layers"])
        return Tower(layers, hidden, 2 * hidden * int(vision["intermediate_size"]), 0, layers)
    layers = int(vision["depth"])
    if kind == "qwen2_vl":
        hidden = int(vision["embed_dim"])
        return Tower(layers, hidden, 2 * hidden * int(hidden * vision["mlp_ratio"]), 0, layers)
    hidden, mlp = int(vision["hidden_size"]), int(vision["intermediate_size"])
    if kind.startswith("qwen3_"):
        return Tower(layers, hidden, 2 * hidden * mlp, 0, layers)
    if kind.startswith("glm"):
        width = mlp if kind == "glm_ocr" else int(vision["out_hidden_size"])
        return Tower(layers, hidden, 3 * hidden * width, 0, layers)
    window = (int(vision["window_size"]) // int(vision["patch_size"])) ** 2
    return Tower(layers, hidden, 3 * hidden * mlp, window, len(vision["fullatt_block_indexes"]))


def _projector(kind: str, config: Mapping[str, Any], hidden: int) -> int:
    vision = config["vision_config"]
    if kind.startswith("llava"):
        return int(vision["hidden_size"]) * hidden + hidden**2
    if kind.startswith("internvl"):
        merged = int(vision["hidden_size"] / config["downsample_ratio"] ** 2)
        return merged * hidden + hidden**2
    if kind.startswith("glm"):
        widths = config["text_config"] if kind == "glm_ocr" else vision
        inner = int(widths["intermediate_size"])
        merged = int(vision["hidden_size"]) * int(vision["spatial_merge_size"]) ** 2
        return hidden * (merged + hidden + 3 * inner)
    inner = int(vision.get("embed_dim") or vision["hidden_size"]) * int(vision["spatial_merge_size"]) ** 2
    mergers = 1 + len(vision.get("deepstack_visual_indexes") or ())
    return mergers * (inner**2 + inner * hidden)

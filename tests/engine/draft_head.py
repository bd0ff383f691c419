"""Heads that vLLM loads as drafters, made from a tiny model so that their drafts are accepted: nothing is trained.

Behind each token of a table, they draft the one that follows it there. An output of theirs is a linear function of
the token's embedding, fitted by least squares to the target's row of logits for the next token; whatever else the
target hands them is multiplied by 0.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EAGLE, EAGLE3 = "eagle", "eagle3"
"""The first takes the images' embeddings, like MTP heads; the second is what is published for Qwen-VL."""
_TO_ITSELF = 12.0  # bias of queries and keys, so large that with RoPE a token attends to itself alone
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads")
_ARCHITECTURES = {EAGLE: ("mistral", "EagleMistralForCausalLM"), EAGLE3: ("llama", "LlamaForCausalLMEagle3")}
_EPSILON = 1e-6


def build_draft_head(kind: str, model: Path, directory: Path, following: Mapping[int, int]) -> Path:
    """Write a head beside a model.

    Args:
        kind: ``EAGLE`` or ``EAGLE3``.
        model: A checkpoint of `promprune demo-model --family`.
        directory: Where the head goes.
        following: Token id -> the next one. Exact for as many tokens as values have dimensions: 64 or more.

    Returns:
        The directory.
    """
    config = json.loads((model / "config.json").read_text())
    text: dict[str, Any] = config.get("text_config", config)
    model_type, architecture = _ARCHITECTURES[kind]
    described = {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": _EPSILON,
        "hidden_act": "silu",
        "dtype": "float32",
        "attention_bias": kind == EAGLE3,
        "tie_word_embeddings": False,
        "draft_vocab_size": text["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [text["num_hidden_layers"]],
        "num_aux_hidden_states": 1,
        **{name: text[name] for name in (*_SIZES, "vocab_size")},
        "head_dim": text["hidden_size"] // text["num_attention_heads"],
        "intermediate_size": text["hidden_size"],
    }
    directory.mkdir(parents=True)
    make = {EAGLE: _eagle, EAGLE3: _eagle3}[kind]
    sizes = (text[name] for name in _SIZES)
    save_file(make(*sizes, *_pairs(model, following)), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(described))
    return directory


def build_with_mtp_head(model: Path, directory: Path, following: Mapping[int, int]) -> Path:
    """Copy a Qwen3.5, which carries its head for multi-token prediction itself, with such a head."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"] | {"mtp_num_hidden_layers": 1}
    (directory / "config.json").write_text(json.dumps(config | {"text_config": text}))
    weights = _mtp(text, *_pairs(model, following))
    save_file({f"mtp.{name}": values for name, values in weights.items()}, directory / "mtp.safetensors")
    return directory


def _pairs(model: Path, following: Mapping[int, int]) -> tuple[Tensor, Tensor]:
    """Return the embeddings of tokens, and the rows of logits of those that follow them, both ``(T, size)``."""
    target = {name: rows.float() for file in model.glob("*.safetensors") for name, rows in load_file(file).items()}
    (embedding,) = (rows for name, rows in target.items() if name.endswith("embed_tokens.weight"))
    (logits,) = (rows for name, rows in target.items() if name.endswith("lm_head.weight"))
    tokens = sorted(following)
    return embedding[tokens], logits[[following[token] for token in tokens]]


def _fit(entering: Tensor, wanted: Tensor) -> Tensor:
    """Return ``(size, width)`` weights that map rows ``(T, width)`` to the direction of rows ``(T, size)``."""
    rows = torch.nn.functional.normalize(wanted) * wanted.shape[1] ** 0.5
    return torch.linalg.lstsq(entering, rows, driver="gelsd").solution.T.contiguous()


def _eagle(size: int, heads: int, groups: int, entering: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return weights whose layer adds nothing: the projection of embedding and hidden state does it all."""
    keys = groups * (size // heads)
    weights = {
        "fc.weight": torch.cat([_fit(entering, wanted), torch.zeros(size, size)], dim=1),
        "norm.weight": torch.ones(size),
        **{f"layers.0.{name}_layernorm.weight": torch.ones(size) for name in ("input", "post_attention")},
        **{f"layers.0.self_attn.{name}_proj.weight": torch.zeros(size, size) for name in "qo"},
        **{f"layers.0.self_attn.{name}_proj.weight": torch.zeros(keys, size) for name in "kv"},
        **{f"layers.0.mlp.{name}_proj.weight": torch.zeros(size, size) for name in ("gate", "up", "down")},
    }
    return {f"model.{name}": values for name, values in weights.items()}


def _eagle3(size: int, heads: int, groups: int, entering: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return weights whose layer attends to the token alone: only attention takes the embedding."""
    keys = groups * (size // heads)
    values = torch.randn(keys, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    attended = torch.nn.functional.rms_norm(entering, (size,), eps=_EPSILON) @ values.T  # (T, keys)
    attended = attended.view(len(attended), groups, -1).repeat_interleave(heads // groups, 1).flatten(1)
    return {
        "fc.weight": torch.zeros(size, size),
        "norm.weight": torch.ones(size),
        **{f"midlayer.{name}_layernorm.weight": torch.ones(size) for name in ("input", "post_attention")},
        "midlayer.hidden_norm.weight": torch.ones(size),
        "midlayer.self_attn.q_proj.weight": torch.zeros(size, 2 * size),
        "midlayer.self_attn.q_proj.bias": torch.full((size,), _TO_ITSELF),
        "midlayer.self_attn.k_proj.weight": torch.zeros(keys, 2 * size),
        "midlayer.self_attn.k_proj.bias": torch.full((keys,), _TO_ITSELF),
        "midlayer.self_attn.v_proj.weight": torch.cat([values, torch.zeros(keys, size)], dim=1),
        "midlayer.self_attn.v_proj.bias": torch.zeros(keys),
        "midlayer.self_attn.o_proj.weight": _fit(attended, wanted),
        "midlayer.self_attn.o_proj.bias": torch.zeros(size),
        **{f"midlayer.mlp.{name}_proj.weight": torch.zeros(size, size) for name in ("gate", "up", "down")},
    }


def _mtp(text: Mapping[str, int], entering: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return weights whose layer adds nothing; its norms multiply by one more than their weights."""
    size, heads, groups = (text[name] for name in _SIZES)
    head, mlp = text["head_dim"], text["intermediate_size"]
    normed = torch.nn.functional.rms_norm(entering, (size,), eps=_EPSILON)
    shapes = {"q": (2 * heads * head, size), "k": (groups * head, size), "v": (groups * head, size)}
    shapes |= {"o": (size, heads * head)}
    return {
        "fc.weight": torch.cat([_fit(normed, wanted), torch.zeros(size, size)], dim=1),
        **{
            f"{name}.weight": torch.zeros(size) for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
        },
        **{f"layers.0.{name}_layernorm.weight": torch.zeros(size) for name in ("input", "post_attention")},
        **{f"layers.0.self_attn.{name}_norm.weight": torch.zeros(head) for name in "qk"},
        **{f"layers.0.self_attn.{name}_proj.weight": torch.zeros(shape) for name, shape in shapes.items()},
        **{f"layers.0.mlp.{name}_proj.weight": torch.zeros(mlp, size) for name in ("gate", "up")},
        "layers.0.mlp.down_proj.weight": torch.zeros(size, mlp),
    }

"""Runs the model's own layers on few tokens, to make training cheap: subsets of patches, packed questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deploy.training import tokenizer
from promprune_vllm.demo import processing
from promprune_vllm.demo.scenes.record import PATCH

# Some heads of the first three layers are supervised. Words that name a thing attend to the word before them
# ("red" meets "star"), then to the patches of what they name; then the answer position attends to those words.
GAZING_LAYERS, GAZING_HEADS = (0, 1, 2), 3
NEVER = -1e9  # a masked logit; with minus infinity, fully masked rows would have no gradient
PREFIX = (processing.BOS_ID, 4)  # <s>USER:, before the image


def normalize_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """Return `(B, K)` patches of `(B, 576, 588)` uint8, normalized like CLIP's preprocessing, float32."""
    rows = torch.arange(len(patches), device=patches.device)[:, None]
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=patches.device).repeat_interleave(PATCH * PATCH)
    std = torch.tensor(OPENAI_CLIP_STD, device=patches.device).repeat_interleave(PATCH * PATCH)
    return (patches[rows, indices].float() / 255 - mean) / std


def patch_statistics(patches: Tensor) -> Tensor:
    """Return simple statistics of a patch: mean red, green, blue, and variation across and down.

    Args:
        patches: ``(B, K, 588)`` from `normalize_patches`.

    Returns:
        ``(B, K, 5)``, of about unit size.
    """
    planes = patches.view(*patches.shape[:2], 3, PATCH * PATCH)
    green = planes[:, :, 1].contiguous()
    # `across` wraps around at the end of each row, which hardly matters.
    across = (green[..., 1:] - green[..., :-1]).abs().mean(-1).add(0.01).log()
    down = (green[..., PATCH:] - green[..., :-PATCH]).abs().mean(-1).add(0.01).log()
    return torch.cat([planes.mean(-1), across[..., None] + 2, down[..., None] + 2], dim=-1)


def encode_patches(tower: Any, patches: Tensor, indices: Tensor) -> Tensor:
    """Run all but the last layer of the tower on some patches.

    Args:
        tower: A `CLIPVisionModel`.
        patches: ``(B, K, 588)`` from `normalize_patches`.
        indices: ``(B, K)`` indices of these patches.

    Returns:
        ``(B, 1 + K, Dv)``: the features of LLaVA's layer -2, class token first.
    """
    embeddings = tower.embeddings
    weight = embeddings.patch_embedding.weight.flatten(1)
    positions = embeddings.position_embedding.weight
    hidden = functional.linear(patches, weight) + positions[1:][indices]
    first = (embeddings.class_embedding + positions[0]).expand(len(patches), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first.to(hidden.dtype), hidden], dim=1))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    out: Tensor = hidden
    return out


def prefix_tokens(images: int) -> list[list[int]]:
    """Return the tokens before each image of a prompt, as the chat template writes them."""
    from deploy.training.samples import token_ids

    if images == 1:
        return [list(PREFIX)]
    numbered = [list(token_ids(ordinal)) for ordinal in tokenizer.ORDINALS[:images]]
    return [[*PREFIX, *numbered[0]], *numbered[1:]]


def predict(
    model: Any, images: list[Tensor], text: Tensor, captured: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Answer packed questions; each question attends to the images and itself, as if it were asked alone.

    Args:
        model: A `LlavaForConditionalGeneration`.
        images: Projected tokens of the first image of each row, of the second, ...; each ``(B, K, D)``.
        text: ``(B, 6, T)`` from `samples.pack`.
        captured: List that receives, for each of `GAZING_LAYERS`, the result of `_attention_logits` and the text
            tokens after the layer, ``(B, T, D)`` of unit size.

    Returns:
        ``(B, T, V)`` logits of the next token at each position.
    """
    llama = model.model.language_model
    embedded = []
    for prefix, image in zip(prefix_tokens(len(images)), images, strict=True):
        ids = torch.tensor(prefix, device=image.device)
        embedded += [llama.embed_tokens(ids).expand(len(image), -1, -1).to(image.dtype), image]
    before = sum(part.shape[1] for part in embedded)
    ids, offsets, number = text[:, 0].long(), text[:, 1].long(), text[:, 2]
    hidden = torch.cat([*embedded, llama.embed_tokens(ids).to(embedded[1].dtype)], dim=1)
    positions = torch.cat([torch.arange(before, device=ids.device).expand(len(ids), -1), before + offsets], dim=1)
    cos_sin = llama.rotary_emb(hidden, position_ids=positions)
    mask = _mask(before, number)
    for depth, layer in enumerate(llama.layers):
        entering = hidden
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=cos_sin)
        if captured is not None and depth in GAZING_LAYERS:
            attention = _attention_logits(layer, entering, before, cos_sin)
            attention = attention.masked_fill(~mask[:, :, before:], NEVER)
            captured.append((attention, functional.rms_norm(hidden[:, before:], hidden.shape[-1:])))
    logits: Tensor = model.lm_head(llama.norm(hidden[:, before:]))
    return logits


def _attention_logits(layer: Any, hidden: Tensor, before: int, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Return attention logits of some heads from each text token to all tokens, `(B, heads, T, before + T)`."""
    normed = layer.input_layernorm(hidden)
    attend = layer.self_attn
    query, key = (
        project(normed).view(*normed.shape[:2], -1, attend.head_dim)[:, :, :GAZING_HEADS].transpose(1, 2)
        for project in (attend.q_proj, attend.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *cos_sin)
    logits: Tensor = query[:, :, before:] @ key.transpose(-1, -2) * attend.head_dim**-0.5
    return logits


def _mask(before: int, number: Tensor) -> Tensor:
    """Return the attention mask, `(B, 1, before + T, before + T)` bool: true where attention is allowed."""
    rows, text = number.shape
    mask = torch.ones(before + text, before + text, dtype=torch.bool, device=number.device).tril()
    mask = mask.repeat(rows, 1, 1)
    mask[:, before:, before:] &= number[:, :, None] == number[:, None, :]
    return mask[:, None]

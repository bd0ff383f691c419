"""The model's own layers, called so that training pays for few tokens: subsets of patches, packed questions."""

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

# What some heads of the first three layers are told to do. Words that name a thing look at the word before them
# ("red" meets "star"), then at the patches of what they name; then the place of the answer looks at those words.
GAZING_LAYERS, GAZING_HEADS = (0, 1, 2), 3
NEVER = -1e9  # a logit; minus infinity has no gradient where nothing else is
PREFIX = (processing.BOS_ID, 4)  # <s>USER:, before the image


def normalised(patches: Tensor, indices: Tensor) -> Tensor:
    """Choose `(B, K)` patches of `(B, 576, 588)` uint8, normalised as CLIP's preprocessing does, float32."""
    rows = torch.arange(len(patches), device=patches.device)[:, None]
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=patches.device).repeat_interleave(PATCH * PATCH)
    std = torch.tensor(OPENAI_CLIP_STD, device=patches.device).repeat_interleave(PATCH * PATCH)
    return (patches[rows, indices].float() / 255 - mean) / std


def look(chosen: Tensor) -> Tensor:
    """What a patch looks like by itself: mean red, green, blue, and how much it changes across and down.

    Args:
        chosen: ``(B, K, 588)`` of `normalised`.

    Returns:
        ``(B, K, 5)``, of about unit size.
    """
    planes = chosen.view(*chosen.shape[:2], 3, PATCH * PATCH)
    green = planes[:, :, 1].contiguous()
    across = (green[..., 1:] - green[..., :-1]).abs().mean(-1).add(0.01).log()  # wraps around; it hardly shows
    down = (green[..., PATCH:] - green[..., :-PATCH]).abs().mean(-1).add(0.01).log()
    return torch.cat([planes.mean(-1), across[..., None] + 2, down[..., None] + 2], dim=-1)


def see(tower: Any, chosen: Tensor, indices: Tensor) -> Tensor:
    """Run all but the last layer of the tower on some patches.

    Args:
        tower: A `CLIPVisionModel`.
        chosen: ``(B, K, 588)`` of `normalised`.
        indices: ``(B, K)``, which patches these are.

    Returns:
        ``(B, 1 + K, Dv)``: what a LLaVA reads at its layer -2, the class token first.
    """
    embeddings = tower.embeddings
    weight = embeddings.patch_embedding.weight.flatten(1)
    places = embeddings.position_embedding.weight
    hidden = functional.linear(chosen, weight) + places[1:][indices]
    first = (embeddings.class_embedding + places[0]).expand(len(chosen), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first.to(hidden.dtype), hidden], dim=1))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    out: Tensor = hidden
    return out


def prefix_tokens(images: int) -> list[list[int]]:
    """The tokens before each image of a prompt, as the chat template writes them."""
    from deploy.training.samples import token_ids

    if images == 1:
        return [list(PREFIX)]
    numbered = [list(token_ids(ordinal)) for ordinal in tokenizer.ORDINALS[:images]]
    return [[*PREFIX, *numbered[0]], *numbered[1:]]


def read(
    model: Any, images: list[Tensor], text: Tensor, watched: list[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Answer packed questions; every question sees the images and itself, as if it were asked alone.

    Args:
        model: A `LlavaForConditionalGeneration`.
        images: Projected tokens of the first image of each row, of the second, ...; each ``(B, K, D)``.
        text: ``(B, 6, T)`` of `samples.pack`.
        watched: Gets, of each of `GAZING_LAYERS`, what `_gaze` tells and the text's tokens after it, ``(B, T, D)``
            of unit size.

    Returns:
        ``(B, T, V)``: logits of the token after each.
    """
    llama = model.model.language_model
    embedded = []
    for prefix, image in zip(prefix_tokens(len(images)), images, strict=True):
        ids = torch.tensor(prefix, device=image.device)
        embedded += [llama.embed_tokens(ids).expand(len(image), -1, -1).to(image.dtype), image]
    before = sum(part.shape[1] for part in embedded)
    ids, offsets, number = text[:, 0].long(), text[:, 1].long(), text[:, 2]
    hidden = torch.cat([*embedded, llama.embed_tokens(ids).to(embedded[1].dtype)], dim=1)
    places = torch.cat([torch.arange(before, device=ids.device).expand(len(ids), -1), before + offsets], dim=1)
    cos_sin = llama.rotary_emb(hidden, position_ids=places)
    mask = _mask(before, number)
    for depth, layer in enumerate(llama.layers):
        entering = hidden
        hidden = layer(hidden, attention_mask=mask, position_ids=places, position_embeddings=cos_sin)
        if watched is not None and depth in GAZING_LAYERS:
            looks = _gaze(layer, entering, before, cos_sin).masked_fill(~mask[:, :, before:], NEVER)
            watched.append((looks, functional.rms_norm(hidden[:, before:], hidden.shape[-1:])))
    logits: Tensor = model.lm_head(llama.norm(hidden[:, before:]))
    return logits


def _gaze(layer: Any, hidden: Tensor, before: int, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Attention logits of some heads from each token of the text to all, `(B, heads, T, before + T)`."""
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
    """Who may look at whom, `(B, 1, before + T, before + T)` bool."""
    rows, text = number.shape
    mask = torch.ones(before + text, before + text, dtype=torch.bool, device=number.device).tril()
    mask = mask.repeat(rows, 1, 1)
    mask[:, before:, before:] &= number[:, :, None] == number[:, None, :]
    return mask[:, None]

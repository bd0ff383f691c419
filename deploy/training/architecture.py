"""The demo model's architecture and its initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from deploy.training import tokenizer
from promprune_vllm.demo import processing
from promprune_vllm.demo.scenes.record import COLOURS, GRID, PATCH, PIXELS, SHAPES

VISION_HIDDEN, HIDDEN = 128, 192
_POSITION_SCALE = 0.6

# What the auxiliary heads predict for a patch: (name, width), in the order of their columns.
PATCH_HEADS = (
    ("shape", len(SHAPES) + 2),  # also card and plate
    ("colour", len(COLOURS)),
    ("digit", 10),
    ("rank", 3),  # first, middle or last on its plate
    ("centre", 1),  # whether it contains the center of a thing
    ("xy", 2),
    ("look", 5),  # its mean red, green and blue, and its variation along each axis
)
SHOWN = (
    len(SHAPES) * len(COLOURS) + 10
)  # predictions of the class token: which colored shapes and digits are shown


class Heads(nn.Module):
    """Auxiliary heads, for training only: predictions from every patch and from the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(VISION_HIDDEN, sum(width for _, width in PATCH_HEADS))
        self.shown = nn.Linear(VISION_HIDDEN, SHOWN)
        self.place = nn.Linear(HIDDEN, 2)  # position of the thing that a word names or a question is about
        nn.init.zeros_(self.place.weight)  # no gradient reaches the other layers until it has learned something

    def forward(self, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map `(B, 1 + K, Dv)`, class token first, to logits `(B, K, width)` by head and `(B, SHOWN)`."""
        columns = self.patch(hidden[:, 1:]).split([width for _, width in PATCH_HEADS], dim=-1)
        return {name: part for (name, _), part in zip(PATCH_HEADS, columns, strict=True)}, self.shown(hidden[:, 0])


def llava_config() -> LlavaConfig:
    """Return the configuration that is trained and exported; 3.1 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=512,
        num_hidden_layers=5,  # the last one is in the file, as in every LLaVA, but its output is not used
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=tokenizer.VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,  # of size 32, the smallest that vLLM's CPU attention supports
        max_position_embeddings=tokenizer.MAX_TOKENS,
        **processing.ROLE_IDS,
        dtype="float32",
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=processing.IMAGE_ID,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **processing.ROLE_IDS,
        dtype="float32",
    )


def new_model(seed: int) -> tuple[Any, Heads]:
    """Return an untrained `LlavaForConditionalGeneration`, and its heads.

    Position embeddings start as 2-D sines and cosines: with random ones the model did not learn within half an
    hour where things are, or how two of them are positioned relative to each other.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(llava_config())
    heads = Heads()
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = sin_cos_positions() * _POSITION_SCALE
        model.model.vision_tower.embeddings.position_embedding.weight[0] = 0.0
        _spread_llama(model.model.language_model)
        unused = model.model.vision_tower.encoder.layers[-1]  # made an identity, so that it never outputs noise
        for linear in (unused.self_attn.out_proj, unused.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    for parameter in unused.parameters():
        parameter.requires_grad_(False)
    return model, heads


def _spread_llama(llama: Any) -> None:
    """Scale embeddings and layer outputs to about unit size.

    With the usual 0.02, the first layer's output drowned out the word embeddings, and accuracy stayed at chance.
    """
    llama.embed_tokens.weight.normal_()
    for layer in llama.layers:
        attend, mlp = layer.self_attn, layer.mlp
        for linear in (attend.q_proj, attend.k_proj, attend.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
        for linear in (attend.o_proj, mlp.down_proj):
            linear.weight.normal_(std=(2 * len(llama.layers) * linear.in_features) ** -0.5)


@torch.no_grad()
def begin_projector(projector: Any, hidden: Tensor) -> None:
    """Initialize the projector to whiten the tower's features, with outputs of zero mean and unit size.

    The directions of the tower's features have very different scales (color is in small ones), around a large
    mean. Without whitening, the model learned shapes but not colors.

    Args:
        projector: Projector of a LLaVA.
        hidden: ``(N, Dv)`` features of the trained tower.
    """
    first, second = projector.linear_1, projector.linear_2
    mean = hidden.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(hidden.T))
    whiten = vectors @ torch.diag((values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
    first.weight.copy_(torch.randn_like(first.weight) * first.in_features**-0.5 @ whiten)
    first.bias.copy_(-first.weight @ mean)
    second.weight.normal_(std=second.in_features**-0.5)
    second.bias.zero_()
    tokens = projector(hidden)
    second.weight.div_(tokens.std(0).mean())
    second.bias.copy_(-projector(hidden).mean(0))


def sin_cos_positions() -> Tensor:
    """Return sines and cosines of each patch's row and column at 32 frequencies per axis, `(576, Dv)`."""
    quarter = VISION_HIDDEN // 4
    frequency = torch.pi * 2.0 ** torch.linspace(-1, 3, quarter)  # half a period to eight periods per side
    at = (torch.arange(GRID) + 0.5) / GRID
    waves = torch.cat(
        [torch.sin(at[:, None] * frequency), torch.cos(at[:, None] * frequency)], dim=1
    )  # (24, Dv / 2)
    rows = waves[:, None, :].expand(GRID, GRID, -1)
    columns = waves[None, :, :].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, VISION_HIDDEN)

"""The demo model's shape and its weights before training."""

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

# What the auxiliary heads tell of a patch: (name, width), in the order of their columns.
PATCH_HEADS = (
    ("shape", len(SHAPES) + 2),  # and card, plate
    ("colour", len(COLOURS)),
    ("digit", 10),
    ("rank", 3),  # first, in between or last on its plate
    ("centre", 1),  # whether a thing's centre lies in it
    ("xy", 2),
    ("look", 5),  # its own mean red, green and blue, and how much it varies each way
)
SHOWN = len(SHAPES) * len(COLOURS) + 10  # what the class token tells: which coloured shapes and digits there are


class Heads(nn.Module):
    """Heads that are read during training only: what every patch and the class token must tell."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(VISION_HIDDEN, sum(width for _, width in PATCH_HEADS))
        self.shown = nn.Linear(VISION_HIDDEN, SHOWN)
        self.place = nn.Linear(HIDDEN, 2)  # where the thing is that a word names, or that a question is about
        nn.init.zeros_(self.place.weight)  # what it tells the others to do waits until it tells something

    def forward(self, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """From `(B, 1 + K, Dv)`, the class token first: logits `(B, K, width)` by head, and `(B, SHOWN)`."""
        columns = self.patch(hidden[:, 1:]).split([width for _, width in PATCH_HEADS], dim=-1)
        return {name: part for (name, _), part in zip(PATCH_HEADS, columns, strict=True)}, self.shown(hidden[:, 0])


def llava_config() -> LlavaConfig:
    """The configuration that is trained and exported; 3.1 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=512,
        num_hidden_layers=5,  # the last one is in the file, as in every LLaVA, but no feature is read from it
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
        num_attention_heads=6,  # of 32, the least that vLLM's CPU attention takes
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
    """A `LlavaForConditionalGeneration` to be trained, and its heads.

    Patches start out knowing where they are (2-D sines and cosines): with random position embeddings the model did
    not learn within half an hour where things lie or how two of them lie to each other.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(llava_config())
    heads = Heads()
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = sin_cos_positions() * _POSITION_SCALE
        model.model.vision_tower.embeddings.position_embedding.weight[0] = 0.0
        _spread_llama(model.model.language_model)
        unused = model.model.vision_tower.encoder.layers[-1]  # passes its input on, so that nobody reads noise
        for linear in (unused.self_attn.out_proj, unused.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
    for parameter in unused.parameters():
        parameter.requires_grad_(False)
    return model, heads


def _spread_llama(llama: Any) -> None:
    """Make embeddings and what layers add to them of about unit size.

    With the customary 0.02, a word was lost among what the first layer added to it, and reading stayed at chance.
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
    """Begin with a projector that takes the tower's features whitened, to tokens of zero mean and unit size.

    What the tower tells lies in directions of very different size (the colour in small ones), around a large mean.
    Read as they are, shapes were learnt and colours were not.

    Args:
        projector: Of a LLaVA.
        hidden: ``(N, Dv)`` of what the trained tower tells.
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
    """Sines and cosines of the patch's row and column at eight to thirty-two periods, `(576, Dv)`."""
    quarter = VISION_HIDDEN // 4
    frequency = torch.pi * 2.0 ** torch.linspace(-1, 3, quarter)  # half a period to eight periods a side
    at = (torch.arange(GRID) + 0.5) / GRID
    waves = torch.cat(
        [torch.sin(at[:, None] * frequency), torch.cos(at[:, None] * frequency)], dim=1
    )  # (24, Dv / 2)
    rows = waves[:, None, :].expand(GRID, GRID, -1)
    columns = waves[None, :, :].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], dim=-1).reshape(GRID * GRID, VISION_HIDDEN)

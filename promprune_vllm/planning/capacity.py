"""Computes what fits on a GPU at each budget, from a model's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from promprune_vllm.core.budget import Budget
from promprune_vllm.core.policy import BudgetPolicy
from promprune_vllm.errors import BudgetError, PlanError
from promprune_vllm.planning.facts import Facts

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by its data sheet.

    Args:
        memory_gib: Memory in GiB.
        tflops: Peak dense bfloat16 throughput, in 10^12 operations per second.
    """

    memory_gib: float
    tflops: float


GPUS = {
    "h200": Gpu(141, 989),
    "h100": Gpu(80, 989),
    "a100": Gpu(80, 312),
    "l40s": Gpu(48, 362),
    "l4": Gpu(24, 121),
    "rtx4090": Gpu(24, 165),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """A typical chat.

    Args:
        size: Width and height of its images, or of the frames of its videos, in pixels.
        images: Number of images or videos.
        text_tokens: Prompt tokens besides the images.
        answer_tokens: Generated tokens.
        frames: Frames that vLLM samples of each video; 0 for images.
    """

    size: tuple[int, int]
    images: int = 1
    text_tokens: int = 64
    answer_tokens: int = 128
    frames: int = 0


@dataclass(frozen=True, slots=True)
class Server:
    """The hardware and options of a server.

    Args:
        gpu: The kind of GPU.
        ranks: GPUs that share the model (tensor parallel size).
        utilisation: Share of GPU memory that vLLM may use.
        reserve_gib: Part of that memory for activations and graphs, in GiB per GPU.
        mfu: Share of peak throughput that is reached.
        cache_bytes: Bytes per number in the KV cache; same as the weights by default.
        block_tokens: Tokens per KV-cache block, or a multiple of it in models with linear layers.
    """

    gpu: Gpu
    ranks: int = 1
    utilisation: float = 0.92
    reserve_gib: float = 2.0
    mfu: float = 0.4
    cache_bytes: int | None = None
    block_tokens: int = 16


@dataclass(frozen=True, slots=True)
class Row:
    """Estimates for one budget.

    Args:
        budget: The budget.
        kept: Tokens kept per image or video.
        prompt_tokens: Prompt tokens of a chat.
        kv_bytes_per_image: KV-cache bytes of the kept tokens of an image or video.
        chats: Number of chats, with their answers, that fit in the KV cache.
        images_per_s: Upper limit of images or videos per second, from encoding and prefill alone.
        arithmetic: Operations of encoding and prefill, as a share of those with all tokens.
    """

    budget: str
    kept: int
    prompt_tokens: int
    kv_bytes_per_image: int
    chats: int
    images_per_s: float
    arithmetic: float


def kv_memory(facts: Facts, server: Server) -> int:
    """Return the bytes left for the KV cache, summed over all ranks.

    Raises:
        PlanError: The weights leave no memory.
    """
    each = server.gpu.memory_gib * server.utilisation - server.reserve_gib
    left = round(each * GIB * server.ranks) - facts.parameters * facts.dtype_bytes
    if left <= 0:
        raise PlanError(
            f"{facts.name} has {facts.parameters * facts.dtype_bytes / GIB:.1f} GiB of weights, and "
            f"{each * server.ranks:.1f} GiB may be used: use more GPUs (--ranks) or larger ones."
        )
    return left


def plan(facts: Facts, server: Server, traffic: Traffic, budgets: Sequence[object]) -> list[Row]:
    """Compute the estimates for each budget; the first row keeps every token.

    Raises:
        PlanError: A budget is invalid, the model does not fit, or it takes no videos.
    """
    if traffic.frames:
        frames, _ = facts.video_grid(traffic.frames, *traffic.size)
        seen = facts.video_tokens(traffic.frames, *traffic.size)
        encode = facts.video_encoder_flops(traffic.frames, *traffic.size)
    else:
        frames, seen, encode = 1, facts.visual_tokens(*traffic.size), facts.encoder_flops(*traffic.size)
    memory = kv_memory(facts, server)
    encode *= traffic.images
    per_token = facts.kv_bytes_per_token(server.cache_bytes)
    whole = encode + facts.decoder.prefill_flops(traffic.text_tokens + traffic.images * seen)
    rows = []
    for budget in ("full", *budgets):
        kept = _kept(budget, seen, frames)
        prompt = traffic.text_tokens + traffic.images * kept
        chat = facts.chat_bytes(prompt + traffic.answer_tokens, server.block_tokens, server.cache_bytes)
        flops = encode + facts.decoder.prefill_flops(prompt)
        rows.append(
            Row(
                budget=str(budget),
                kept=kept,
                prompt_tokens=prompt,
                kv_bytes_per_image=kept * per_token,
                chats=memory // chat,
                images_per_s=traffic.images * server.gpu.tflops * 1e12 * server.ranks * server.mfu / flops,
                arithmetic=flops / whole,
            )
        )
    return rows


def _kept(budget: object, seen: int, frames: int) -> int:
    try:
        return BudgetPolicy().resolve(Budget.parse(budget), seen, frames=frames)
    except BudgetError as error:
        raise PlanError(str(error)) from error

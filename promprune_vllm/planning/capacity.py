"""From a model's sizes to what fits a GPU, budget by budget."""

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
    """A GPU as its data sheet has it.

    Args:
        memory_gib: In GiB.
        tflops: Dense bfloat16, in 10^12 operations a second.
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
    """What a chat is like.

    Args:
        size: Width and height of its images in pixels.
        images: How many it has.
        text_tokens: Of its prompt besides them.
        answer_tokens: That are generated.
    """

    size: tuple[int, int]
    images: int = 1
    text_tokens: int = 64
    answer_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Server:
    """What the chats run on.

    Args:
        gpu: Each of them.
        ranks: How many share the model (tensor parallelism).
        utilisation: Share of the memory vLLM may take.
        reserve_gib: Of that, for activations and graphs, per GPU.
        mfu: Share of the peak arithmetic that is reached.
        cache_bytes: Of one number in the KV cache; that of the weights by default.
        block_tokens: Of one block of it.
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
    """What one budget is worth.

    Args:
        budget: As it was asked.
        kept: Tokens of one image.
        prompt_tokens: Of a chat.
        kv_bytes_per_image: That its kept tokens take.
        chats: That are in the KV cache at once, with their answers.
        images_per_s: At most, encoding and prefill alone.
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
    """Bytes that are left for the KV cache on all ranks together.

    Raises:
        PlanError: The weights leave nothing.
    """
    each = server.gpu.memory_gib * server.utilisation - server.reserve_gib
    left = round(each * GIB * server.ranks) - facts.parameters * facts.dtype_bytes
    if left <= 0:
        raise PlanError(
            f"{facts.name} has {facts.parameters * facts.dtype_bytes / GIB:.1f} GiB of weights, and "
            f"{each * server.ranks:.1f} GiB may be used: take more GPUs (--ranks) or larger ones."
        )
    return left


def plan(facts: Facts, server: Server, traffic: Traffic, budgets: Sequence[object]) -> list[Row]:
    """Work out what each budget is worth; the first row is without one.

    Raises:
        PlanError: A budget that is none, or a model that does not fit.
    """
    seen = facts.visual_tokens(*traffic.size)
    memory = kv_memory(facts, server)
    encode = traffic.images * facts.encoder_flops(*traffic.size)
    per_token = facts.kv_bytes_per_token(server.cache_bytes)
    whole = encode + facts.decoder.prefill_flops(traffic.text_tokens + traffic.images * seen)
    rows = []
    for budget in ("full", *budgets):
        kept = _kept(budget, seen)
        prompt = traffic.text_tokens + traffic.images * kept
        blocks = -(-(prompt + traffic.answer_tokens) // server.block_tokens)
        flops = encode + facts.decoder.prefill_flops(prompt)
        rows.append(
            Row(
                budget=str(budget),
                kept=kept,
                prompt_tokens=prompt,
                kv_bytes_per_image=kept * per_token,
                chats=memory // (blocks * server.block_tokens * per_token),
                images_per_s=traffic.images * server.gpu.tflops * 1e12 * server.ranks * server.mfu / flops,
                arithmetic=flops / whole,
            )
        )
    return rows


def _kept(budget: object, seen: int) -> int:
    try:
        return BudgetPolicy().resolve(Budget.parse(budget), seen)
    except BudgetError as error:
        raise PlanError(str(error)) from error

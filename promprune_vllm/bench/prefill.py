"""``promprune bench prefill``: time of prefill with all visual tokens, with K, and of selecting the K.

PromPrune needs the attention that tokens receive. A tower with a class token has computed it; for the others it is
computed a second time, and that is timed alone too. Methods that need no attention are timed beside PromPrune.

The language models have the published widths and random weights: prefill time does not depend on weight values.
If the machine is too small for a whole model, fewer layers run and their time is scaled up, since every layer does
the same work. The selection time is not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from promprune_vllm.bench import machine, plain, workload
from promprune_vllm.bench.provenance import provenance
from promprune_vllm.core.savings import Decoder
from promprune_vllm.errors import BenchError
from promprune_vllm.kernels import ops

TEXT_TOKENS = 64
_LLAMA = Decoder(layers=32, hidden=4096, heads=32, kv_heads=32, head=128, intermediate=11008)
_QWEN = Decoder(layers=28, hidden=3584, heads=28, kv_heads=4, head=128, intermediate=18944)
_QWEN3 = Decoder(layers=36, hidden=4096, heads=32, kv_heads=8, head=128, intermediate=12288)


@dataclass(frozen=True, slots=True)
class Case:
    """One image on one model.

    Args:
        model: Name of the model with these sizes.
        decoder: Sizes of its language model.
        groups: Parts of the image (tiles) that are pruned separately.
        n: Visual tokens per group.
        keep: Tokens kept per group.
        patches: Patches whose received attention is computed as saliency; 0 if a class token provides it for free.
        vision_head: Width of the 16 attention heads that those patches have.
    """

    model: str
    decoder: Decoder
    groups: int
    n: int
    keep: int
    patches: int = 0
    vision_head: int = 80


REHEARSAL = "tiny"
"""A case that shows nothing, but quickly."""
CASES = {
    "llava-1.5-7b": Case("LLaVA-1.5-7B", _LLAMA, 1, 576, 64),
    "llava-next-7b": Case("LLaVA-NeXT-7B", _LLAMA, 5, 576, 64),
    "qwen2.5-vl-7b": Case("Qwen2.5-VL-7B", _QWEN, 1, 1296, 256, patches=5184),
    # The same picture of 1008 x 1008 pixels, in tokens of 32 x 32 pixels instead of 28 x 28.
    "qwen3-vl-8b": Case("Qwen3-VL-8B", _QWEN3, 1, 1024, 256, patches=4096, vision_head=72),
    REHEARSAL: Case("tiny", Decoder(4, 128, 4, 2, 32, 256), 1, 64, 16, patches=256),
}
_VISION_HEADS = 16
FREE = ("divprune", "random")
"""Methods without attention: the one that selects by the tokens, and the floor."""
SELECTIONS = ("ours", "plain", *FREE)
"""PromPrune with our kernels and by the plain procedure, and the methods without attention."""


def measure(
    names: Sequence[str], *, device: str, layers: int | None, repeats: int, show_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and return the result as a document.

    Args:
        names: Keys of ``CASES``.
        device: ``cpu`` (float32) or ``cuda`` (bfloat16).
        layers: Decoder layers to run; by default all on CUDA and two on a CPU.
        repeats: Repeats of each variant, interleaved.
        show_progress: Called with a line of text whenever a case starts.
    """
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise BenchError(f"--model must be one of {', '.join(CASES)}, got {unknown[0]}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: torch sees no CUDA device here. Omit the option to measure on the CPU.")
    ops.warm_up(torch.device(device))
    rows = []
    for name in names:
        case = CASES[name]
        run = layers or (case.decoder.layers if device == "cuda" else 2)
        show_progress(f"{case.model}: {run} of {case.decoder.layers} layers …")
        rows.append(_measure(case, torch.device(device), min(run, case.decoder.layers), repeats))
    return {
        **provenance(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "kernels": ops.in_force(torch.device(device)),
        "text_tokens": TEXT_TOKENS,
        "repeats": repeats,
        "cases": rows,
    }


def _measure(case: Case, device: torch.device, layers: int, repeats: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prefill = _prefill(case.decoder, layers, device, dtype)
    visual = {"full": case.groups * case.n, "native": case.groups * case.keep}
    inputs = {
        name: torch.randn(1, tokens + TEXT_TOKENS, case.decoder.hidden, device=device, dtype=dtype)
        for name, tokens in visual.items()
    }
    variants: dict[str, Callable[[], object]] = {
        "full": lambda: prefill(inputs["full"]),
        "native": lambda: prefill(inputs["native"]),
        **_selections(case, device, dtype),
    }
    timed = {name: _synchronized(run, device) for name, run in variants.items()}
    times = machine.time_interleaved(timed, repeats, machine.clock(threads=2)[1])
    factor = case.decoder.layers / layers
    full, native = (times[name]["median"] * factor for name in ("full", "native"))
    costs = {name: times[name]["median"] for name in SELECTIONS}
    return {
        "model": case.model,
        "tokens": visual["full"],
        "kept": visual["native"],
        "layers": case.decoder.layers,
        "layers_run": layers,
        "full_ms": full,
        "native_ms": native,
        "selection_ms": costs,
        "saving_kept": {name: 1 - cost / (full - native) for name, cost in costs.items()},
        "attention_share": times["attention"]["median"] / costs["ours"] if case.patches else None,
        "measured": times,
    }


def _synchronized(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def whole() -> None:
        with torch.inference_mode():
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return whole


def _prefill(
    decoder: Decoder, layers: int, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], object]:
    """Return a function that runs ``(1, T, hidden)`` prompt embeddings through the layers, filling a KV cache."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(before)
    return lambda embeddings: model(inputs_embeds=embeddings, use_cache=True)


def _selections(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return functions that select an image's tokens, by name, and ``attention``, if it is computed, alone."""
    images = workload.Images.generate(case.groups, case.n, case.decoder.hidden, dtype, device)
    shape = (case.patches, _VISION_HEADS, case.vision_head)
    random = torch.Generator().manual_seed(1)
    queries, keys = (torch.randn(shape, generator=random).to(device, dtype) for _ in range(2))

    def attention(received: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        return received(queries, keys, case.vision_head**-0.5).view(case.n, -1).mean(dim=1)

    def with_attention(received: Callable[[Tensor, Tensor, float], Tensor]) -> workload.Images:
        return images.with_saliency(attention(received)) if case.patches else images

    def gathered(select: Callable[[], list[Tensor]]) -> Callable[[], object]:
        return lambda: [x[indices] for x, indices in zip(images.tokens, select(), strict=True)]

    selections = {
        "ours": gathered(lambda: with_attention(ops.received_attention).select(case.keep)),
        "plain": gathered(lambda: with_attention(plain.received_attention).select_plain(case.keep)),
        **{method: gathered(partial(images.select_by, method, case.keep)) for method in FREE},
    }
    return {**selections, "attention": lambda: attention(ops.received_attention)} if case.patches else selections


def table(document: dict[str, Any]) -> Table:
    """Return the document as a table."""
    title = f"Prefill with {TEXT_TOKENS} text tokens, and selection (saving kept), in ms on {document['device']}"
    shown = Table(title=title)
    for name in ("model", "visual tokens", "all", "K", "promprune", "attention in it", "plain", *FREE):
        shown.add_column(name, justify="left" if name == "model" else "right")
    for row in document["cases"]:
        scaled = (
            "" if row["layers"] == row["layers_run"] else f"\n{row['layers_run']} of {row['layers']} layers run"
        )
        share = row["attention_share"]
        ours, *others = (
            f"{row['selection_ms'][name]:.1f} ({row['saving_kept'][name]:.1%})" for name in SELECTIONS
        )
        shown.add_row(
            row["model"] + scaled,
            f"{row['tokens']} to {row['kept']}",
            *(f"{row[name]:.1f}" for name in ("full_ms", "native_ms")),
            ours,
            "-" if share is None else f"{share:.0%}",
            *others,
        )
    return shown

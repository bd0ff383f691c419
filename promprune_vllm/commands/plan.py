"""``promprune plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from promprune_vllm.commands.failures import failing
from promprune_vllm.errors import PlanError
from promprune_vllm.markdown import table as markdown
from promprune_vllm.planning.capacity import GIB, GPUS, Gpu, Row, Server, Traffic, kv_memory
from promprune_vllm.planning.capacity import plan as rows_of
from promprune_vllm.planning.facts import Facts, read

_MODEL = Annotated[
    str, typer.Option("--model", help="Model directory, path of its config.json, or Hugging Face name.")
]
_GPU = Annotated[str, typer.Option("--gpu", help=f"GPU: {', '.join(GPUS)}.")]
_MEMORY = Annotated[
    float | None, typer.Option("--gpu-memory", min=0.1, help="GiB of memory per GPU (default: that of --gpu).")
]
_TFLOPS = Annotated[
    float | None,
    typer.Option(
        "--tflops",
        min=0.1,
        help="Peak dense bfloat16 throughput per GPU, in TFLOPS (default: that of --gpu).",
    ),
]
_RANKS = Annotated[int, typer.Option("--ranks", min=1, help="GPUs per model (tensor parallel size).")]
_USED = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization", min=0.05, max=1.0, help="As vLLM's option: share of GPU memory it may use."
    ),
]
_RESERVE = Annotated[
    float, typer.Option("--reserve", min=0.0, help="GiB per GPU for activations and CUDA graphs.")
]
_MFU = Annotated[float, typer.Option("--mfu", min=0.01, max=1.0, help="Share of peak throughput that is reached.")]
_CACHE = Annotated[
    str, typer.Option("--kv-cache-dtype", help="auto (same as the weights), fp8, bfloat16 or float16.")
]
_IMAGE = Annotated[str, typer.Option("--image", metavar="WxH", help="Image size in pixels.")]
_VIDEO = Annotated[
    str | None,
    typer.Option(
        "--video",
        metavar="FRAMESxWxH",
        help="Plan for videos instead: the frames that vLLM samples, and their size in pixels.",
        show_default=False,
    ),
]
_IMAGES = Annotated[int, typer.Option("--images", min=1, help="Images or videos per chat.")]
_TEXT = Annotated[int, typer.Option("--text-tokens", min=0, help="Prompt tokens besides the images.")]
_ANSWER = Annotated[int, typer.Option("--answer-tokens", min=1, help="Tokens per answer.")]
_BUDGETS = Annotated[str, typer.Option("--budgets", help='Tokens, or shares such as "25%", comma-separated.')]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]
_MARKDOWN = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]


def plan(
    *,
    model: _MODEL,
    gpu: _GPU = "h100",
    gpu_memory: _MEMORY = None,
    tflops: _TFLOPS = None,
    ranks: _RANKS = 1,
    gpu_memory_utilization: _USED = 0.92,
    reserve: _RESERVE = 2.0,
    mfu: _MFU = 0.4,
    kv_cache_dtype: _CACHE = "auto",
    image: _IMAGE = "1024x768",
    video: _VIDEO = None,
    images: _IMAGES = 1,
    text_tokens: _TEXT = 64,
    answer_tokens: _ANSWER = 128,
    budgets: _BUDGETS = "50%,25%,128,64",
    as_json: _JSON = False,
    as_markdown: _MARKDOWN = False,
) -> None:
    """Estimate from a model's config.json what budgets save on a GPU: KV cache, concurrent chats, images/s."""
    with failing(status=1):
        gpu_spec = _gpu(gpu, gpu_memory, tflops)
        server = Server(gpu_spec, ranks, gpu_memory_utilization, reserve, mfu, _cache_bytes(kv_cache_dtype))
        frames, size = (0, _size(image)) if video is None else _clip(video)
        traffic = Traffic(size, images, text_tokens, answer_tokens, frames)
        facts = read(model)
        rows = rows_of(facts, server, traffic, [_budget(text) for text in budgets.split(",") if text.strip()])
        memory = kv_memory(facts, server)
    if as_json:
        typer.echo(json.dumps(_document(facts, server, traffic, memory, rows), indent=2))
    elif as_markdown:
        typer.echo(markdown(_headings(traffic), _cells(rows)))
    else:
        _show(facts, server, traffic, memory, rows)


def _gpu(name: str, memory: float | None, tflops: float | None) -> Gpu:
    if name not in GPUS:
        raise PlanError(
            f"--gpu must be one of {', '.join(GPUS)}, got {name!r}. For another GPU, name the closest one and set "
            "--gpu-memory and --tflops."
        )
    data_sheet = GPUS[name]
    return Gpu(memory or data_sheet.memory_gib, tflops or data_sheet.tflops)


def _cache_bytes(name: str) -> int | None:
    kinds = {"auto": None, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "bfloat16": 2, "float16": 2}
    if name not in kinds:
        raise PlanError(f"--kv-cache-dtype must be one of {', '.join(kinds)}, got {name!r}.")
    return kinds[name]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise PlanError(f"{text!r} is not a size; give width and height in pixels, such as 1024x768.")
    return int(width), int(height)


def _clip(text: str) -> tuple[int, tuple[int, int]]:
    frames, _, size = text.lower().partition("x")
    if not (frames.isdecimal() and int(frames)) or size.count("x") != 1:
        raise PlanError(f"--video {text!r} is not frames, width and height, such as 64x1280x720.")
    return int(frames), _size(size)


def _budget(text: str) -> object:
    text = text.strip()
    return int(text) if text.isdecimal() else text


def _document(facts: Facts, server: Server, traffic: Traffic, memory: int, rows: list[Row]) -> dict[str, Any]:
    return {
        "model": facts.name,
        "model_type": facts.kind,
        "parameters": facts.parameters,
        "kv_bytes_per_token": facts.kv_bytes_per_token(server.cache_bytes),
        "kv_cache_bytes": memory,
        "server": asdict(server),
        "traffic": asdict(traffic),
        "budgets": [asdict(row) for row in rows],
    }


def _headings(traffic: Traffic) -> tuple[str, ...]:
    of = "a video" if traffic.frames else "an image"
    return "budget", "kept", f"KV of {of}", "chats at once", f"{_rate(traffic)} at most", "arithmetic"


def _rate(traffic: Traffic) -> str:
    return "videos/s" if traffic.frames else "images/s"


def _cells(rows: list[Row]) -> list[tuple[str, ...]]:
    first = rows[0]
    return [
        (
            row.budget,
            f"{row.kept:,}",
            f"{row.kv_bytes_per_image / 2**20:.1f} MiB",
            f"{row.chats:,} ({row.chats / max(first.chats, 1):.1f}x)",
            f"{row.images_per_s:,.1f} ({row.images_per_s / first.images_per_s:.1f}x)",
            f"{100 * row.arithmetic:.0f}%",
        )
        for row in rows
    ]


def _show(facts: Facts, server: Server, traffic: Traffic, memory: int, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    gpus = f"{server.ranks} GPU{'s' if server.ranks > 1 else ''} of {server.gpu.memory_gib:g} GiB"
    size = f"{traffic.size[0]} x {traffic.size[1]}"
    size = f"{traffic.frames} frames of {size}" if traffic.frames else size
    table = Table(*_headings(traffic), title=f"{facts.name} on {gpus}", title_justify="left")
    for cells in _cells(rows):
        table.add_row(*cells)
    out = Console()
    out.print(table)
    out.print(
        f"{facts.parameters / 1e9:.2f} billion weights; {memory / GIB:.1f} GiB for the KV cache, "
        f"{facts.kv_bytes_per_token(server.cache_bytes) / 1024:g} KiB per token. One chat: {traffic.images} of "
        f"{size} px, {traffic.text_tokens} text tokens, {traffic.answer_tokens} answer tokens. "
        f"{_rate(traffic)} and arithmetic cover encoding and prefill at {100 * server.mfu:.0f}% of peak: the "
        f"encoder processes every patch at every budget, and decoding is extra.{_long_blocks(facts, server)}",
        highlight=False,
    )


def _long_blocks(facts: Facts, server: Server) -> str:
    """Return what to know about a model with linear layers."""
    linear = facts.decoder.linear
    if not linear.count:
        return ""
    block = facts.block_tokens(server.block_tokens, server.cache_bytes)
    return (
        f" {linear.count} of {facts.decoder.layers} layers keep a state instead of a KV cache, as large as a "
        f"block of {block:,} tokens in one of the others. A chat takes whole blocks, so that fewer tokens leave "
        "room for more chats only where they save a block."
    )

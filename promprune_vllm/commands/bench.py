"""``promprune bench``: the options. Each command imports heavy modules only when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from promprune_vllm.commands.failures import fail, failing

bench = typer.Typer(
    name="bench",
    help="Benchmarks: token selection, prefill, serving under load, long soaks, content; all of a GPU in one run.",
    no_args_is_help=True,
)
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]
_URL = Annotated[
    str | None,
    typer.Option("--url", help="A running server, such as http://host:8000. Default: start one for the run."),
]
_MODEL = Annotated[
    Path | None, typer.Option("--model", help="Checkpoint to serve if there is no --url. Default: the demo model.")
]
_BLOCKS = Annotated[
    int, typer.Option("--kv-blocks", min=65, help="Without --url: KV-cache blocks of the server, 32 tokens each.")
]
_BUDGETS = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help='Budget of the requests, or "none" to send none. Repeat to compare; ratios are relative to the '
        "first. Default: full, 256, 64 (with --adaptive: full).",
    ),
]
_FLIGHTS = Annotated[
    list[int] | None,
    typer.Option(
        "--concurrency",
        min=1,
        help="Requests in flight. Repeat for a sweep. Default: 4, 16 (with --adaptive: 32).",
    ),
]
_ADAPTIVE = Annotated[
    bool,
    typer.Option("--adaptive", help='Compare "auto" on a server that adapts to load with the first --budget.'),
]
_ROUNDS = Annotated[int, typer.Option("--rounds", min=1, help="With --adaptive: alternating runs of each budget.")]


@bench.command()
def serving(
    *,
    url: _URL = None,
    model: _MODEL = None,
    kv_blocks: _BLOCKS = 96,
    budget: _BUDGETS = None,
    concurrency: _FLIGHTS = None,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Requests per run.")] = 64,
    output_tokens: Annotated[
        int, typer.Option("--output-tokens", min=1, help="Length of each answer in tokens.")
    ] = 32,
    image_px: Annotated[
        int, typer.Option("--image-px", min=16, help="Width and height of the images in pixels.")
    ] = 336,
    adaptive: _ADAPTIVE = False,
    rounds: _ROUNDS = 2,
    as_json: _JSON = False,
) -> None:
    """Run vLLM's own benchmark against a server: requests/s, time to first token and KV use per budget."""
    from rich.console import Console

    from promprune_vllm.bench import serving as measuring
    from promprune_vllm.bench.load import Load

    err = Console(stderr=True)
    flights = concurrency or ([32] if adaptive else [4, 16])
    loads = [Load(each, requests, output_tokens=output_tokens, image_px=image_px) for each in flights]
    budgets = [_budget(each) for each in budget or (["full"] if adaptive else ["full", "256", "64"])]
    with failing(), measuring.a_server(url, model, kv_blocks, adaptive=adaptive, err=err) as address:
        if adaptive:
            document = measuring.compare_adaptive(address, budgets[0], loads[0], rounds, err)
        else:
            document = measuring.sweep(address, budgets, loads, err)
    _show(document, None if as_json else measuring.table(document))


@bench.command()
def content(
    method: Annotated[str, typer.Option("--method", help="Method that selects the tokens.")] = "promprune",
    as_json: _JSON = False,
) -> None:
    """Compare content-adaptive budgets with fixed ones of the same mean, by what is selected; no model answers."""
    from promprune_vllm.bench import content as measuring

    with failing():
        document = measuring.measure(method)
    _show(document, None if as_json else measuring.table(document))


@bench.command()
def prefill(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="llava-1.5-7b, llava-next-7b, qwen2.5-vl-7b, qwen3-vl-8b, or tiny for a rehearsal. Repeatable. "
            "Default: all but tiny.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="Decoder layers to run. Default: all on CUDA, 2 on a CPU."),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Repeats of each measurement, interleaved.")
    ] = 5,
    *,
    as_json: _JSON = False,
) -> None:
    """Time prefill with all visual tokens, prefill with K of them, and the selection of the K.

    PromPrune is timed beside methods without attention, since some towers compute attention again for it.
    """
    from rich.console import Console

    from promprune_vllm.bench import prefill as measuring

    if device not in ("cpu", "cuda"):
        fail(f"--device must be cpu or cuda, got {device!r}.")
    err = Console(stderr=True)
    with failing(), err.status("") as status:
        document = measuring.measure(
            model or [name for name in measuring.CASES if name != measuring.REHEARSAL],
            device=device,
            layers=layers,
            repeats=repeats,
            show_progress=status.update,
        )
    _show(document, None if as_json else measuring.table(document))


@bench.command()
def soak(
    *,
    url: _URL = None,
    model: _MODEL = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.1, help="Stop after this many minutes.")] = 10.0,
    requests: Annotated[int, typer.Option("--requests", min=1, help="Stop after this many requests.")] = 10_000,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests in flight.")] = 16,
    distinct: Annotated[int, typer.Option("--distinct", min=1, help="Number of different requests.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Random seed of the traffic.")] = 0,
    as_json: _JSON = False,
) -> None:
    """Send mixed traffic for a long time; check each answer against the same request alone, and for leaks."""
    from rich.console import Console

    from promprune_vllm.bench import soak as soaking
    from promprune_vllm.bench.soak_server import a_server

    err = Console(stderr=True)
    with failing(), err.status("") as status, a_server(url, model, status.update) as (address, process):
        plan = soaking.Soak(requests, minutes, concurrency, distinct, seed=seed)
        document = soaking.run(address, plan, process, status.update)
    _show(document, None if as_json else soaking.table(document))
    if not document["passed"]:
        raise typer.Exit(code=1)


@bench.command()
def kernels(
    *,
    device: Annotated[
        str, typer.Option("--device", help="cpu or cuda; cuda is timed both eagerly and from a CUDA graph.")
    ] = "cpu",
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="torch threads; our compiled loops always use one.")
    ] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Repeats of each measurement, interleaved.")
    ] = 7,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the features: float32, bfloat16 or float16.")
    ] = "float32",
    case: Annotated[
        list[str] | None,
        typer.Option("--case", help="Run only this case, NxD:K, such as 576x4096:64. Repeatable."),
    ] = None,
    large: Annotated[
        bool, typer.Option("--large", help="Also run 16384x3584:512; takes minutes and 10 GB.")
    ] = False,
    as_json: _JSON = False,
) -> None:
    """Time token selection: our kernels, straightforward float32 torch, and on CPU our float64 reference."""
    from promprune_vllm.bench import kernel_cases
    from promprune_vllm.bench import kernels as measured

    try:
        cases = kernel_cases.cases(case, large=large)
        measured.run(cases, threads=threads, repeats=repeats, dtype=dtype, as_json=as_json, device=device)
    except ValueError as error:
        fail(str(error))


@bench.command()
def gpu(
    *,
    out: Annotated[
        Path, typer.Option("--out", help="New folder for gpu.json, gpu.md, and the logs of tests and server.")
    ],
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.5, help="Time limit; what no longer fits is skipped and named.")
    ] = 8.0,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="tests, kernels, prefill or vllm. Repeatable. Default: all, in this order."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cuda, or cpu for a rehearsal.")] = "cuda",
    shape: Annotated[
        str, typer.Option("--shape", help="7b: widths of models of 7B and 8B; tiny for a rehearsal.")
    ] = "7b",
    commit: Annotated[
        str | None, typer.Option("--commit", help="Commit of the code, for a copy of it without its .git.")
    ] = None,
) -> None:
    """Measure all that a GPU can show, most telling first: kernel tests, selection, prefill, vLLM itself.

    Both files in OUT are complete after each step, so an interrupted run leaves what it has measured. Weights are
    random, and nothing is downloaded. `tests` needs a checkout, pytest and hypothesis; `vllm` needs vLLM; the
    others only torch, Triton and transformers. Models of 7B need 20 GB on the GPU. What is missing is skipped and
    named; what fails is recorded, and the rest still runs. The exit status is 1 if a stage failed or was cut off.
    """
    from promprune_vllm.bench.gpu import run as measuring
    from promprune_vllm.bench.gpu.report import MARKDOWN

    with failing():
        report = measuring.run(
            out,
            device=device,
            shape=shape,
            minutes=minutes,
            only=only or (),
            commit=commit,
            tell=lambda text: typer.echo(text, err=True),
        )
    typer.echo((out / MARKDOWN).read_text(encoding="utf-8"))
    if report.names("failed", "cut off"):
        raise typer.Exit(code=1)


def _budget(text: str) -> object:
    """Parse a budget: "none" for no budget, JSON such as 64 or 0.25, or else the string itself."""
    if text == "none":
        return None
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value


def _show(document: dict[str, Any], table: Any) -> None:
    from rich.console import Console

    if table is None:
        typer.echo(json.dumps(document, indent=2))
    else:
        Console(width=None if Console().is_terminal else 130).print(table)

"""``promprune demo``: cost and answer of one question about one scene at four budgets; or traffic."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from promprune_vllm.core.budget import FIELD
from promprune_vllm.demo.model import cache_directory, find_or_build_demo_model
from promprune_vllm.demo.next_steps import next_steps
from promprune_vllm.demo.scenes import Question, Scene, make_scene
from promprune_vllm.demo.sender import Report, Traffic, send
from promprune_vllm.demo.server import Server, one_worker, serving
from promprune_vllm.demo.trained import TRAINED
from promprune_vllm.errors import DemoError

BUDGETS = (None, 256, 128, 64)
SCENE = ("scattered", 0)  # kind and number of a held-out scene
WARM_UP_SCENE = ("scattered", 1)
TASK = "digit"  # the demo asks the scene's first question of this task
MODEL_NAME = "demo"
DEFAULT_PORT = 8000
_ANSWER_TOKENS = 8
_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Row:
    """Cost of one request, as the server reports it.

    Args:
        budget: Budget of the request; ``None`` for none.
        seen: Visual tokens of the image before pruning.
        kept: Visual tokens that entered the language model.
        prompt_tokens: ``usage.prompt_tokens`` of the reply.
        kv_blocks: KV-cache blocks of the prompt, ``_BLOCK_TOKENS`` tokens each, rounded up.
        first_token_ms: Time from the request to the first streamed token.
        selection_ms: Time of the selection; ``None`` if every token was kept.
        answer: The model's answer.
    """

    budget: int | None
    seen: int
    kept: int
    prompt_tokens: int
    kv_blocks: int
    first_token_ms: float
    selection_ms: float | None
    answer: str


def run_demo(*, once: bool, as_json: bool, port: int | None, traffic: Traffic | None = None) -> None:
    """Serve the demo model, measure, print the results, and keep serving unless ``once``.

    Args:
        once: Stop after printing the results.
        as_json: Print one JSON document on stdout instead of the table.
        port: Port; ``None`` for 8000, or for any free port with ``once``; 0 for any free port.
        traffic: Traffic to send instead of the four budgets.

    Raises:
        DemoError: The server could not be started, or ended unexpectedly.
    """
    err = Console(stderr=True)
    server_port = port if port is not None else (0 if once else DEFAULT_PORT)
    with _demo_server(err, server_port, traffic) as server:
        if traffic is None:
            _show_budgets(list(_measure_budgets(err, server)), as_json=as_json)
        else:
            run_traffic(server.url, traffic, None, as_json=as_json)
        if not once:
            image = cache_directory() / "demo-scene.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(_png(make_scene(*SCENE)))
            steps = next_steps(server.url, MODEL_NAME, image, _question(make_scene(*SCENE)))
            (err if as_json else Console()).print(steps, highlight=False, soft_wrap=True)
            _serve_until_interrupted(server)


def run_traffic(url: str, traffic: Traffic, api_key: str | None, *, as_json: bool) -> Report:
    """Send traffic to a running server and print the results.

    Args:
        url: Base address of a server that runs the plugin.
        traffic: How much to send.
        api_key: API key of the server, if it requires one.
        as_json: Print one JSON document on stdout instead of the table.

    Raises:
        DemoError: No such server answers, it rejects the key, or it went away.
    """
    what = f"{traffic.seconds:g} s of traffic to {url}, {traffic.concurrency} requests at a time"
    with _progress(Console(stderr=True), f"Sending {what} …"):
        report = send(url, traffic, api_key)
    if as_json:
        print(json.dumps(report.as_document(), indent=2), flush=True)
    else:
        Console().print(report.as_table())
    return report


def _show_budgets(rows: list[Row], *, as_json: bool) -> None:
    if not as_json:
        Console().print(_table(rows))
        return
    question = _question(make_scene(*SCENE))
    document = {"model": MODEL_NAME, "scene": SCENE, "question": question.text, "right_answer": question.answer}
    print(json.dumps(document | {"rows": [asdict(row) for row in rows]}, indent=2), flush=True)


@contextmanager
def _demo_server(err: Console, port: int, traffic: Traffic | None) -> Iterator[Server]:
    if traffic is None:
        model = TRAINED
    else:  # the larger model with random weights, whose answers never end early
        with _progress(err, "Building a model for traffic: a small LLaVA-1.5 with seeded random weights …"):
            model = find_or_build_demo_model()
    options = ["--served-model-name", MODEL_NAME, "--enforce-eager", "--max-model-len", "2048"]
    options += ["--block-size", str(_BLOCK_TOKENS), "--visual-token-detail", *_device_options()]
    if traffic is not None:
        options += ["--visual-token-allow-methods", ",".join(_simple_methods())]
    options, environment = one_worker(options, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    started = time.monotonic()
    with ExitStack() as stack:
        with _progress(err, "Starting the server …") as update:
            starting = serving(
                model,
                *options,
                port=port,
                environment=environment,
                on_stage=lambda stage: update(f"Starting the server: {stage} …"),
            )
            server = stack.enter_context(starting)
        err.print(f"The server is up at {server.url} after {time.monotonic() - started:.0f} s.", highlight=False)
        yield server


@contextmanager
def _progress(err: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show the progress: a status line on a terminal, plain lines in a log. Yields a function that updates it."""
    if err.is_terminal:
        with err.status(text) as status:
            yield status.update
    else:
        err.print(text, highlight=False)
        yield lambda more: err.print(more, highlight=False)


def _device_options() -> tuple[str, ...]:
    import torch

    # On a CPU, float32 is the fastest type in which vLLM is exact; GPUs use the model's default.
    return () if torch.cuda.is_available() else ("--dtype", "float32")


def _simple_methods() -> list[str]:
    """Return the methods that need nothing but an image's projected tokens, to compare with the default."""
    from promprune_vllm.core.features import Need
    from promprune_vllm.core.registry import methods

    return [name for name, method in methods(over_frames=False).items() if method.needs == Need.PROJECTED]


def _measure_budgets(err: Console, server: Server) -> Iterator[Row]:
    with _progress(err, "Warming up with another scene …"):
        for budget in BUDGETS:
            _ask(server, make_scene(*WARM_UP_SCENE), budget)
    for budget in BUDGETS:
        with _progress(err, f"Asking about the scene with {_describe_budget(budget)} …"):
            row = _measure(server, budget)
        yield row


def _measure(server: Server, budget: int | None) -> Row:
    before = server.metrics("promprune")
    first_token_ms, prompt_tokens, answer = _ask(server, make_scene(*SCENE), budget)
    after = server.metrics("promprune")

    def increase(name: str) -> float:
        return after[name] - before[name]

    seconds = increase("promprune_selection_seconds_sum")
    return Row(
        budget=budget,
        seen=round(increase("promprune_visual_tokens_seen_total")),
        kept=round(increase("promprune_visual_tokens_kept_total")),
        prompt_tokens=prompt_tokens,
        kv_blocks=-(-prompt_tokens // _BLOCK_TOKENS),
        first_token_ms=round(first_token_ms, 1),
        selection_ms=round(seconds * 1000, 2) if seconds else None,
        answer=answer,
    )


def _ask(server: Server, scene: Scene, budget: int | None) -> tuple[float, int, str]:
    """Stream one answer with the OpenAI SDK.

    Returns:
        Milliseconds to the first token, the number of prompt tokens, and the answer.
    """
    from openai import OpenAI

    started = time.perf_counter()
    first_token_ms = None
    answer = ""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        stream = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": _content(scene)}],
            max_tokens=_ANSWER_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={} if budget is None else {FIELD: budget},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first_token_ms = first_token_ms or (time.perf_counter() - started) * 1000
                answer += chunk.choices[0].delta.content
            if chunk.usage and first_token_ms is not None:
                return first_token_ms, chunk.usage.prompt_tokens, answer.strip()
    raise DemoError("The server ended the stream without an answer.")


def _content(scene: Scene) -> Any:
    image = base64.b64encode(_png(scene)).decode()
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        {"type": "text", "text": _question(scene).text},
    ]


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    scene.image().save(file, "png")
    return file.getvalue()


def _question(scene: Scene) -> Question:
    return next(question for question in scene.questions() if question.task == TASK)


def _table(rows: list[Row]) -> Table:
    question = _question(make_scene(*SCENE))
    title = f"One scene, four budgets: “{question.text}” It is {question.answer}."
    table = Table(title=title, title_justify="left")
    table.add_column("budget")
    for name in ("tokens seen", "kept", "prompt tokens", "KV blocks", "first token", "selection", "answer"):
        table.add_column(name, justify="right", no_wrap=" " not in name)  # in 80 columns, the others wrap
    for row in rows:
        table.add_row(
            "none" if row.budget is None else str(row.budget),
            str(row.seen),
            str(row.kept),
            str(row.prompt_tokens),
            str(row.kv_blocks),
            f"{row.first_token_ms:.0f} ms",
            "" if row.selection_ms is None else f"{row.selection_ms:.1f} ms",
            row.answer,
        )
    return table


def _describe_budget(budget: int | None) -> str:
    return "no budget" if budget is None else f"{FIELD}={budget}"


def _serve_until_interrupted(server: Server) -> None:
    try:
        status = server.process.wait()
    except KeyboardInterrupt:
        return
    raise DemoError(f"The server ended with status {status}.")

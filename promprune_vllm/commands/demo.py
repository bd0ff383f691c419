"""``promprune demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from promprune_vllm.commands.failures import fail, failing

_ONCE = Annotated[bool, typer.Option("--once", help="Stop the server after printing the table.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]
_PORT = Annotated[
    int | None,
    typer.Option(
        "--port", min=0, max=65535, help="Port; 0 picks a free one. Default: 8000, or a free one with --once."
    ),
]
_TRAFFIC = Annotated[
    float | None,
    typer.Option(
        "--traffic",
        min=1,
        metavar="SECONDS",
        help="Instead of the table, send mixed images and budgets for this long.",
    ),
]
_URL = Annotated[
    str | None,
    typer.Option("--url", help="With --traffic: send it to this running server, such as http://127.0.0.1:8000."),
]
_KEY = Annotated[
    str | None, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="API key of the server at --url, if any.")
]
_FLIGHT = Annotated[int, typer.Option(min=1, max=256, help="With --traffic: requests in flight.")]
_SEED = Annotated[int, typer.Option(help="With --traffic: random seed; the same seed sends the same requests.")]


def demo(
    *,
    once: _ONCE = False,
    as_json: _JSON = False,
    port: _PORT = None,
    seconds: _TRAFFIC = None,
    url: _URL = None,
    api_key: _KEY = None,
    concurrency: _FLIGHT = 4,
    seed: _SEED = 0,
) -> None:
    """Serve a small model and ask it about one scene with several budgets, or send it mixed traffic."""
    from promprune_vllm.demo.run import run_demo, run_traffic
    from promprune_vllm.demo.sender import Traffic

    if url is not None and seconds is None:
        fail("--url needs --traffic SECONDS: without it, the demo uses the server that it starts itself.")
    traffic = None if seconds is None else Traffic(seconds, concurrency, seed)
    with failing():
        if url is not None and traffic is not None:
            run_traffic(url, traffic, api_key, as_json=as_json)
        else:
            run_demo(once=once, as_json=as_json, port=port, traffic=traffic)

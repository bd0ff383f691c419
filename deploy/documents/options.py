"""The table of ``promprune serve`` options in docs/server.md."""

from __future__ import annotations

from promprune_vllm.commands.serve_options import explanation, variable
from promprune_vllm.config import FLAG, Settings
from promprune_vllm.markdown import table


def markdown() -> str:
    """Render the table."""
    rows = [
        (f"`{FLAG}{name.replace('_', '-')}`", f"`{variable(name)}`", explanation(field))
        for name, field in Settings.model_fields.items()
    ]
    return table(("option of `promprune serve`", "variable", "what it does"), rows)

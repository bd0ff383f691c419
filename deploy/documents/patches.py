"""Renders for the documentation which functions of vLLM are patched, and which attributes are set."""

from __future__ import annotations

from collections.abc import Iterator

from promprune_vllm.engine.compat.patching import Patch, Reason
from promprune_vllm.engine.keys import WRITTEN_ATTRIBUTES
from promprune_vllm.engine.patches import PATCHES
from promprune_vllm.markdown import table


def markdown() -> str:
    """Render every patch, in the order in which a request meets the processes."""
    columns = ("patched function", "installed in", "feature", "wrapper")
    return table(
        columns, ((_target(each), each.stage.value, each.reason.feature, _file(each)) for each in PATCHES)
    )


def reasons_markdown() -> str:
    """Render why vLLM is patched, which change in vLLM would make that unnecessary, and for how many rows."""
    columns = ("feature", "why it needs a patch", "what would make the patch unnecessary", "rows")
    return table(columns, _reasons())


def writes_markdown() -> str:
    """Render which attributes of other programs' objects are set."""
    return table(("attribute", "why it is set"), ((f"`{name}`", why) for name, why in WRITTEN_ATTRIBUTES.items()))


def _reasons() -> Iterator[tuple[str, ...]]:
    rows: dict[Reason, int] = {}
    for each in PATCHES:
        rows[each.reason] = rows.get(each.reason, 0) + 1
    for reason, number in rows.items():
        yield reason.feature, reason.why, reason.until, str(number)


def _target(patch: Patch) -> str:
    module, _, name = patch.target.partition(":")
    limits = (
        f"since {patch.seam.since}" if patch.seam.since else "",
        f"before {patch.seam.before}" if patch.seam.before else "",
    )
    noted = ", ".join(limit for limit in limits if limit)
    return f"`{name}` of `{module.removeprefix('vllm.')}`" + (f" ({noted})" if noted else "")


def _file(patch: Patch) -> str:
    module, _, function = patch.wrapper.partition(":")
    return f"`{module}.{function}`"

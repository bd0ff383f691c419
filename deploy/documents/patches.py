"""The tables of our patches of vLLM, and of the attributes that we set on its objects."""

from __future__ import annotations

from collections.abc import Iterator

from promprune_vllm.engine.compat.patching import Patch, Reason
from promprune_vllm.engine.keys import WRITES
from promprune_vllm.engine.patches import PATCHES
from promprune_vllm.markdown import table


def markdown() -> str:
    """Render every patch, in the order in which a request passes through the processes."""
    columns = ("patched", "where", "for", "by")
    return table(
        columns, ((_target(each), each.stage.value, each.reason.feature, _file(each)) for each in PATCHES)
    )


def reasons_markdown() -> str:
    """Render why vLLM is patched, and which change in vLLM would let us delete how many patches."""
    columns = ("for", "why it takes a patch", "what would let us delete it", "rows")
    return table(columns, _reasons())


def writes_markdown() -> str:
    """Render the attributes that we set on objects of other packages."""
    return table(("attribute", "why it is set"), ((f"`{name}`", why) for name, why in WRITES.items()))


def _reasons() -> Iterator[tuple[str, ...]]:
    rows: dict[Reason, int] = {}
    for each in PATCHES:
        rows[each.reason] = rows.get(each.reason, 0) + 1
    for reason, number in rows.items():
        yield reason.feature, reason.why, reason.until, str(number)


def _target(patch: Patch) -> str:
    module, _, name = patch.target.partition(":")
    limits = (f"since {patch.since}" if patch.since else "", f"before {patch.before}" if patch.before else "")
    versions = ", ".join(limit for limit in limits if limit)
    return f"`{name}` of `{module.removeprefix('vllm.')}`" + (f" ({versions})" if versions else "")


def _file(patch: Patch) -> str:
    module, _, function = patch.wrapper.partition(":")
    return f"`{module}.{function}`"

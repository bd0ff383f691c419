"""How this vLLM compares with the tested ones, as ``GET /v1/visual_tokens`` tells it."""

from __future__ import annotations

from promprune_vllm.engine.compat.parts import Kind
from promprune_vllm.engine.compat.verdict import Verdict
from promprune_vllm.server.schemas import PartOff, VllmCheck


def vllm_check(found: Verdict) -> VllmCheck:
    """Return what a verdict says."""
    off = (*found.of_kind(Kind.FAMILY).items(), *found.of_kind(Kind.FEATURE).items())
    return VllmCheck(
        tested=found.tested,
        compared_with=found.reference,
        compared=found.seams,
        off=[PartOff(part=part.name, effect=part.without, changed=list(changed)) for part, changed in off],
        ignored=[change for changed in found.ignored.values() for change in changed],
    )

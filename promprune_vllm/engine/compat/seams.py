"""Everything in vLLM that this release depends on: what it calls, overrides or wraps, or whose code it relies on.

``fingerprints.json`` has the hashes for every tested version. `make seams` generates it from vLLM's wheels, and
prints what a new version has changed.
"""

from __future__ import annotations

from promprune_vllm.engine.compat import versions
from promprune_vllm.engine.compat.engine_seams import ENGINE_SEAMS
from promprune_vllm.engine.compat.model_seams import MODEL_SEAMS
from promprune_vllm.engine.compat.parts import Part
from promprune_vllm.engine.compat.seam import Seam

SEAMS: tuple[Seam, ...] = (*ENGINE_SEAMS, *MODEL_SEAMS)
"""Every seam of this release, in any minor."""


def require(*parts: Part) -> None:
    """Check what some parts call or override; ``patches`` checks what they wrap.

    Raises:
        IncompatibleVllmError: A name is missing or takes other parameters.
    """
    minor = versions.installed_minor()
    for seam in SEAMS:
        if seam.part in parts and seam.use == "call" and seam.in_minor(minor):
            seam.require()

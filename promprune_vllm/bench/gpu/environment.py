"""Prints what the machine has as JSON: ``python -m promprune_vllm.bench.gpu.environment``.

In a process of its own: asking torch for a device creates a CUDA context, and the other stages need its memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import torch

from promprune_vllm.bench.provenance import provenance


def environment() -> dict[str, Any]:
    """Return the GPU, its driver, CUDA, and what provenance has; the GPU's fields are ``None`` without one."""
    there = torch.cuda.is_available()
    device: Any = torch.cuda.get_device_properties(0) if there else None
    return {
        **provenance(),
        "gpu": device.name if there else None,
        "gpus": torch.cuda.device_count(),
        "memory_bytes": device.total_memory if there else None,
        "capability": f"{device.major}.{device.minor}" if there else None,
        "driver": _driver() if there else None,
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, ``None`` if ``nvidia-smi`` is not installed or does not know it."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return None
    words = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.splitlines()[0].strip() if said.strip() else None


if __name__ == "__main__":
    print(json.dumps(environment(), indent=2))

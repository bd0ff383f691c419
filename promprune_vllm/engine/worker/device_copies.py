"""Copies to the device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.platform_utils import is_pin_memory_available


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor's copy on a device, for use on the current stream.

    A plain ``to(device)`` on CUDA waits for everything that was launched before: behind the vision tower, for the
    whole encoder. A copy is asynchronous only from pinned memory, which torch keeps until the copy is done.
    """
    pinned = values.pin_memory() if device.type == "cuda" and is_pin_memory_available() else values
    return pinned.to(device, non_blocking=True)

"""vLLM 0.33 for CPUs: a linear layer that gets rows of a wrong width writes past the end of its output.

``onednn_mm`` (vllm/_custom_ops.py) makes the output for as many rows as the input has, and reshapes the input to
rows of the layer's width. If the widths differ, so do the numbers of rows, and nobody compares them. Here the
output is a part of a larger tensor, so that nothing else is overwritten.

    python cpu_linear.py     # exits with 1 where rows behind the output are written
"""

from __future__ import annotations

import os
import sys

os.environ.update(VLLM_PLUGINS="")  # stock vLLM

import torch
from vllm import _custom_ops as ops

ROWS, WIDTH, OUTPUTS = 6, 128, 256


def main() -> int:
    """Multiply rows of twice the width, as ``onednn_mm`` does, and count the rows that are written."""
    weight = torch.ones(OUTPUTS, WIDTH)
    wide = torch.ones(ROWS, 2 * WIDTH)
    try:
        torch.nn.functional.linear(wide, weight)
    except RuntimeError as error:
        print("torch:", error)
    handler = ops.create_onednn_mm(weight.t(), 32)
    memory = torch.full((4 * ROWS, OUTPUTS), -1.0)
    output = memory[:ROWS]
    torch.ops._C.onednn_mm(output, wide.reshape(-1, handler.k), None, handler.handler_tensor)
    written = int((memory != -1).all(dim=1).sum())
    print(f"vLLM: the output has {len(output)} rows, {written} are written")
    return int(written > len(output))


if __name__ == "__main__":
    sys.exit(main())

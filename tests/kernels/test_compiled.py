"""Every kernel compiles for the GPUs vLLM runs on and fits into their shared memory; no GPU is needed for that."""

from __future__ import annotations

import os
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not compiled in this process", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from promprune_vllm.kernels import triton_attention, triton_gram, triton_greedy

SHARED = {89: 99, 90: 227}  # KiB a program may have, by compute capability
F64 = "*fp64"


def _case(kernel: Any, types: str, constants: dict[str, Any], warps: int = 4) -> Any:
    return pytest.param(
        kernel, types.split(), constants, warps, id=f"{kernel.__name__}-{len(constants)}-{constants}"
    )


def _cases() -> list[Any]:
    counts = "*i64 *i32"
    gram = {"COSINES": True, "WIDEN": False, "CHUNK": triton_gram.CHUNK}
    greedy = f"{F64} {F64} {F64} {counts} {F64} {F64} *i64 i32 i32 i32"
    cases = [
        _case(triton_gram._prepare, f"*bf16 *bf16 {F64} i32", {"RESCALE": True, "BLOCK": 1024}),
        _case(triton_greedy._nearest, f"{F64} *i64 *i64 {F64} i32 i32", {"ROWS": 16, "BLOCK": triton_greedy.TILE}),
        _case(
            triton_greedy._subtract_panel,
            f"{F64} {F64} *i64 i32 i32 i32",
            {"SIZE": 32, "BLOCK": triton_greedy.TILE},
        ),
        _case(
            triton_greedy._panel,
            greedy,
            {"SIZE": 32, "WEIGHTED": False, "BOUND": 1e-5, "BLOCK": triton_greedy.MOST_TOKENS},
            16,
        ),
    ]
    for tile in triton_gram.TILES:
        cases.append(_case(triton_gram._gram, f"*bf16 {F64} {F64} i32 i32", {**gram, "BLOCK": tile}))
        square = {"ADVANCE": True, "PRECISION": "tf32x3", "BLOCK": tile, "CHUNK": triton_gram.CHAIN_CHUNK}
        cases.append(_case(triton_gram._square, f"*fp32 *fp32 *fp32 {F64} i32", square))
    for kind, size in (("*bf16", 2), ("*fp32", 4)):
        sizes = {"WIDEN": False, "WIDTH": 128, "BLOCK": triton_attention.BLOCKS[size]}
        cases.append(_case(triton_attention._log_sums, f"{kind} {kind} *fp32 *fp32 i32 i32 i32", sizes))
        cases.append(_case(triton_attention._columns, f"{kind} {kind} *fp32 *fp32 {F64} i32 i32 i32", sizes))
    return cases


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("kernel", "types", "constants", "warps"), _cases())
def test_compiles(kernel: Any, types: list[str], constants: dict[str, Any], warps: int, capability: int) -> None:
    names = kernel.arg_names
    given = [name for name in names if name not in constants]
    assert len(given) == len(types)
    signature = dict.fromkeys(names, "constexpr") | dict(zip(given, types, strict=True))
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in given if signature[name][0] == "*"}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= SHARED[capability] * 1024

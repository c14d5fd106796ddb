# SPDX-License-Identifier: Apache-2.0
"""Grouped LoRA in Triton: one launch, with x A_m^T in the K loop of the base GEMM.

Reads x once per column tile and every weight once per row tile, writes y once; x A_m^T never
leaves the chip. Sums are float32, x A_m^T is rounded to the dtype of x before it meets B_m (as in
the torch chain), and the result is rounded once. float32 uses IEEE products, not TF32.

Triton's builtins only: `tl.zeros` and `tl.cdiv` are jitted when triton is imported (diffusers does
so), and the interpreter can call them only if it was switched on by then.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdda_fast.kernels.current_device import on_its_device

__all__ = ["blocks", "constants", "grouped_lora_layer", "launch", "run"]

_MIN_RANK = 16  # the smallest inner size of tl.dot
_SMS = 132  # H100; the block sizes below follow from this count and are not tuned


@triton.jit(do_not_specialize=["rows"])
def grouped_lora_layer(
    x_ptr,  # [M, rows, C] dense
    weight_ptr,  # [N, C] dense, dtype of x
    bias_ptr,  # [N]; not read without HAS_BIAS
    down_ptr,  # [M, R, C] dense, dtype of x
    up_ptr,  # [M, N, R] dense, dtype of x, scale folded in
    out_ptr,  # [M, rows, N] dense, dtype of x
    rows,  # per objective
    n,  # output features N
    c,  # input features C
    R: tl.constexpr,
    RANK: tl.constexpr,  # R rounded up for tl.dot
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # C is a multiple of BLOCK_K
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # column tiles of the same rows run side by side, and share x in the cache
    first_column = tl.program_id(0) * BLOCK_N
    first_row = tl.program_id(1) * BLOCK_ROWS
    m = tl.program_id(2).to(tl.int64)

    row = tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANK)
    k = tl.arange(0, BLOCK_K)
    # rows and columns beyond the end load the last one again, so that only the store has a mask
    safe_row = tl.minimum(row, rows - 1 - first_row)
    safe_column = tl.minimum(column, n - 1)

    x_ptrs = x_ptr + (m * rows + first_row) * c + safe_row[:, None] * c + k[None, :]
    weight_ptrs = weight_ptr + safe_column[None, :] * c + k[:, None]
    down_ptrs = down_ptr + m * R * c + r[None, :] * c + k[:, None]
    acc = tl.full((BLOCK_ROWS, BLOCK_N), 0.0, tl.float32)
    low = tl.full((BLOCK_ROWS, RANK), 0.0, tl.float32)
    for start in range(0, c, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
            down = tl.load(down_ptrs, mask=r[None, :] < R, other=0.0)
        else:
            inside = k < c - start
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
            down = tl.load(down_ptrs, mask=(r[None, :] < R) & inside[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        low = tl.dot(x, down, low, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
        down_ptrs += BLOCK_K

    up_ptrs = up_ptr + m * n * R + safe_column[None, :] * R + r[:, None]
    up = tl.load(up_ptrs, mask=r[:, None] < R, other=0.0)
    acc = tl.dot(low.to(up.dtype), up, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + safe_column)[None, :].to(tl.float32)
    out_ptrs = out_ptr + (m * rows + first_row) * n + row[:, None] * n + column[None, :]
    written = (row[:, None] < rows - first_row) & (column[None, :] < n)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=written)


def blocks(count: int, rows: int, n: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps: the larger tile if it still gives every multiprocessor work.

    The larger one spills registers on sm_80 beyond rank 64. float32 spills beyond rank 32: without
    tensor cores it is the exact path, not the fast one.
    """
    tiles = count * triton.cdiv(rows, 128) * triton.cdiv(n, 128)
    if dtype == torch.float32:
        size, block_k, warps = 64 if rank <= 16 else 32, 32, 4
    elif tiles >= _SMS and rank <= 64:
        size, block_k, warps = 128, 64, 8
    else:
        size, block_k, warps = 64, 64, 4
    return {
        "BLOCK_ROWS": size,
        "BLOCK_N": size,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": 3,
    }


def constants(c: int, rank: int, block_k: int, *, bias: bool) -> dict[str, int]:
    """Return the compile-time constants of a layer; rows, N and C are run-time values."""
    return {
        "R": rank,
        "RANK": max(_MIN_RANK, triton.next_power_of_2(rank)),
        "HAS_BIAS": bias,
        "EVEN_K": c % block_k == 0,
    }


@on_its_device
def launch(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """y (M, rows, N) for x (M, rows, C) of float32, float16 or bfloat16."""
    count, rows, c = x.shape
    _, n, rank = up.shape
    out = x.new_empty(count, rows, n)
    size = blocks(count, rows, n, rank, x.dtype)
    grid = (triton.cdiv(n, size["BLOCK_N"]), triton.cdiv(rows, size["BLOCK_ROWS"]), count)
    grouped_lora_layer[grid](
        x.contiguous(),
        weight,
        weight if bias is None else bias,
        down,
        up,
        out,
        rows,
        n,
        c,
        **constants(c, rank, size["BLOCK_K"], bias=bias is not None),
        **size,
    )
    return out


# an opaque operator, so that torch.compile(fullgraph=True) passes it on; define and impl cost less
# per call than custom_op
_OP = "msdda_fast::grouped_lora"
torch.library.define(
    _OP, "(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up) -> Tensor"
)
torch.library.impl(_OP, "CompositeExplicitAutograd", launch)


@torch.library.register_fake(_OP)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], len(weight))


run = torch.ops.msdda_fast.grouped_lora.default

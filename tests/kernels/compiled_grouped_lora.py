# SPDX-License-Identifier: Apache-2.0
"""Compile the grouped LoRA kernel for GPUs that need not be there, and print what came out as JSON.

python -m tests.kernels.compiled_grouped_lora
"""

import json
from typing import NamedTuple

import torch
from triton.compiler import ASTSource

from msdda_fast.kernels.grouped_lora._triton import blocks, constants, grouped_lora_layer
from tests.kernels.ahead_of_time import compiled

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Build(NamedTuple):
    """Two objectives of `rows` each, through a layer 320 -> n, on sm_`arch`."""

    arch: int
    dtype: str
    rows: int
    n: int
    rank: int

    def __str__(self) -> str:
        return f"sm_{self.arch}-{self.dtype}-{self.rows}x{self.n}-r{self.rank}"


BUILDS = [
    *(Build(arch, "fp16", 8192, 320, 4) for arch in (80, 90)),  # the 128x128 tile
    *(Build(arch, "fp16", 8192, 320, 64) for arch in (80, 90)),  # its largest rank
    *(Build(arch, "fp16", 128, 1280, 4) for arch in (80, 90)),  # the 64x64 tile
    Build(80, "fp16", 8192, 320, 128),  # the 64x64 tile by rank
    *(Build(arch, "bf16", 8192, 320, 4) for arch in (80, 90)),
    *(Build(arch, "fp32", 8192, 320, 4) for arch in (80, 90)),
    Build(80, "fp32", 8192, 320, 32),
]


def compiled_build(build: Build) -> dict[str, object]:
    size = blocks(2, build.rows, build.n, build.rank, TYPES[build.dtype])
    options = {key: size.pop(key) for key in ("num_warps", "num_stages")}
    known = size | constants(320, build.rank, size["BLOCK_K"], bias=True)
    names = grouped_lora_layer.arg_names
    signature = {
        name: f"*{build.dtype}"
        if name.endswith("_ptr")
        else "constexpr"
        if name in known
        else "i32"
        for name in names
    }
    # what torch's allocator and a layer of SD1.5 give, and the launch finds out by itself
    by_16 = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name.endswith("_ptr") or name in ("n", "c")
    }
    return compiled(ASTSource(grouped_lora_layer, signature, known, by_16), build.arch, options)


if __name__ == "__main__":
    result = {str(build): compiled_build(build) for build in BUILDS}
    free = [entry.name for entry in grouped_lora_layer.params if entry.do_not_specialize]
    print(json.dumps({"builds": result, "not specialised": free}))

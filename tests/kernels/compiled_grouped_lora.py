# SPDX-License-Identifier: Apache-2.0
"""Compile the grouped LoRA kernel for GPUs that need not be there, and print what came out as JSON.

    python -m tests.kernels.compiled_grouped_lora

Its own process, without TRITON_INTERPRET: that variable is read when a kernel is defined.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from msdda_fast.kernels.grouped_lora._triton import blocks, constants, kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


def compiled(build: Build) -> dict[str, object]:
    """Resource usage, as cuobjdump names it, and how often each instruction stands in the code."""
    size = blocks(2, build.rows, build.n, build.rank, TYPES[build.dtype])
    options = {key: size.pop(key) for key in ("num_warps", "num_stages")}
    known = size | constants(320, build.rank, size["BLOCK_K"], bias=True)
    names = kernel.arg_names
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
    source = ASTSource(kernel, signature, known, by_16)
    binary = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = Counter(re.findall(r"^\s*/\*\w+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", code, re.M))
    return found | {"shared": binary.metadata.shared, "instructions": instructions}


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    result = {str(build): compiled(build) for build in BUILDS}
    free = [parameter.name for parameter in kernel.params if parameter.do_not_specialize]
    print(json.dumps({"builds": result, "not specialised": free}))

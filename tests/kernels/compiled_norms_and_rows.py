# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels of norms and rows for GPUs that need not be there, and print what came out.

python -m tests.kernels.compiled_norms_and_rows
"""

import json
from typing import Any

from triton.compiler import ASTSource

from msdda_fast.kernels.group_norm import _triton as norm
from msdda_fast.kernels.rowwise import _triton as rowwise
from tests.kernels.ahead_of_time import compiled

FLOAT32 = ("moments_ptr",)
#: Channels and groups of resnets of Stable Diffusion 1.5: groups of 10, 40 and 80 channels.
NORMS = ((320, 32), (1280, 32), (2560, 32))
ROWS = (320, 1280, 2048)


def source(kernel: Any, constants: dict[str, Any], kind: str) -> ASTSource:
    """The launch with all pointers given and aligned, and channels a multiple of 16."""
    signature, by_16 = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOAT32 else f"*{kind}"
            by_16[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if name == "channels":
                by_16[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, by_16)


def builds(arch: int, kind: str) -> dict[str, dict[str, object]]:
    found = {}
    for channels, groups in NORMS:
        size = norm.tile(groups, channels // groups)
        options = {"num_warps": norm.WARPS}
        for kernel, extra in (
            (norm.group_norm_moments, {}),
            (norm.group_norm_apply, {"SILU": True, "CHUNKS": norm.CHUNKS}),
        ):
            name = f"sm_{arch}-{kind}-{kernel.fn.__name__}-{channels}"
            found[name] = compiled(source(kernel, size | extra, kind), arch, options)
    for kernel in (rowwise.summed, rowwise.gated):
        name = f"sm_{arch}-{kind}-{kernel.fn.__name__}"
        options = {"num_warps": rowwise.WARPS}
        found[name] = compiled(source(kernel, {"BLOCK": rowwise.BLOCK}, kind), arch, options)
    for channels in ROWS:
        size = rowwise.norm_block(channels)
        options = {"num_warps": size.pop("num_warps")}
        name = f"sm_{arch}-{kind}-summed_and_normed-{channels}"
        found[name] = compiled(source(rowwise.summed_and_normed, size, kind), arch, options)
    return found


if __name__ == "__main__":
    every: dict[str, dict[str, object]] = {}
    for arch in (80, 90):
        for kind in ("fp16", "bf16", "fp32"):
            every |= builds(arch, kind)
    print(json.dumps({"builds": every}))

# SPDX-License-Identifier: Apache-2.0
"""Compile the fused step's Triton kernels for sm_80 and sm_90 and print what came out as JSON.

python -m tests.kernels.compiled_fused_step
"""

import json
from typing import NamedTuple

from triton.compiler import ASTSource

from msdda_fast.kernels.fused_step._triton import LAUNCH, columns, pixels_per_thread
from msdda_fast.kernels.fused_step._triton_linear import linear_step
from msdda_fast.kernels.fused_step._triton_moments import moments_step
from tests.kernels.ahead_of_time import compiled

BY_16 = [["tt.divisibility", 16]]
SIZE = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}


class Build(NamedTuple):
    """One specialisation for sm_`arch`: float32 state, M objectives with guidance."""

    kernel: str
    arch: int
    outputs: str = "fp16"
    count: int = 2
    drawn: bool = True
    layout: int = 0
    clip_range: float | None = None
    pixelwise: bool = False
    small: bool = False

    def __str__(self) -> str:
        chosen = (f"{key}={value}" for key, value in self._asdict().items() if value is not False)
        return " ".join(chosen)


def variants(arch: int) -> list[Build]:
    return [
        *(Build("linear", arch, outputs) for outputs in ("fp16", "fp32")),
        *(Build("linear", arch, count=count) for count in (4, 16, 17)),
        Build("linear", arch, clip_range=1.0),
        Build("moments", arch, count=2, pixelwise=True),
    ]


BUILDS = [
    *variants(80),
    *variants(90),
    *(Build("linear", 90, outputs) for outputs in ("bf16", "fp64")),
    Build("linear", 90, drawn=False),
    *(Build("linear", 90, layout=layout) for layout in (1, 2)),
    *(Build("linear", 90, "fp32", 8, clip_range=clip_range) for clip_range in (None, 1.0)),
    Build("linear", 90, small=True),
    *(Build("moments", 90, outputs) for outputs in ("fp16", "fp64")),
    *(Build("moments", 90, count=count, pixelwise=True) for count in (16, 17)),
]


def bytes_read(build: Build) -> int:
    """What a position of one channel reads, as `_triton` counts it."""
    state = 8 if build.outputs == "fp64" else 4
    drawn = 0 if build.drawn else state
    if build.kernel == "linear":
        read = state + (0 if build.count > 16 else build.count * 2 * SIZE[build.outputs])
        return drawn + read * (1 if build.clip_range is None else 2)
    numbers = 2 * state * build.pixelwise
    if build.count > 16:
        return drawn + SIZE[build.outputs] + 2 * numbers
    return drawn + build.count * (SIZE[build.outputs] + numbers)


def source_of(build: Build) -> ASTSource:
    """The launch of `_triton.run` as torch's allocator and SD1.5 latents make it."""
    wide = "fp64" if build.outputs == "fp64" else "fp32"
    stacked = build.count > 16
    objectives = (
        f"*{build.outputs}" if stacked else tuple(f"*{build.outputs}" for _ in range(build.count))
    )
    common = {
        "out": f"*{wide}",
        "noise": None if build.drawn else f"*{wide}",
        "seeds": "*i64" if build.drawn else None,
        "step": "*i64",
        "channels": "i32",
        "pixels": "i32",
    }
    constants = {
        "M": build.count,
        "STACKED": stacked,
        "STEP_POINTER": True,
        "OUT": 0,
        "NOISE": 0,
        "NOISE_TABLE": not build.drawn,
        "BLOCK": 128 if build.small else 128 * pixels_per_thread(bytes_read(build)),
    }
    if build.kernel == "linear":
        kernel = linear_step
        arguments = common | {
            "x": f"*{wide}",
            "outputs": objectives,
            "rows": f"*{wide}",
            "next_input": f"*{build.outputs}",
        }
        constants |= {
            "X": 0,
            "OUTPUTS": build.layout,
            "NEXT": build.layout,
            "RANGE": build.clip_range,
            "COLUMNS": columns(build.count, clips=build.clip_range is not None),
            "BRANCHES": 2 if stacked else (2,) * build.count,
        }
    else:
        kernel = moments_step
        arguments = common | {
            "means": objectives,
            "variances": f"*{wide}",
            "weights": f"*{wide}",
            "mean": None,
            "variance": None,
        }
        constants |= {"VARIANCES": build.pixelwise, "WEIGHTS": build.pixelwise, "MEANS": 0}
    signature, known, aligned = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = arguments.get(name, "constexpr" if name in constants else "i32")
        if kind is None or kind == "constexpr":
            known[(index,)] = constants.get(name)
            kind = "constexpr"
        elif isinstance(kind, tuple):
            aligned |= {(index, m): BY_16 for m in range(len(kind))}
        elif kind.startswith("*") or name == "pixels":
            aligned[(index,)] = BY_16
        signature[name] = kind
    return ASTSource(kernel, signature, known, aligned)


if __name__ == "__main__":
    builds = {str(build): compiled(source_of(build), build.arch, LAUNCH) for build in BUILDS}
    free = {
        kernel.fn.__name__: [p.name for p in kernel.params if p.do_not_specialize]
        for kernel in (linear_step, moments_step)
    }
    print(json.dumps({"builds": builds, "not specialised": free}))

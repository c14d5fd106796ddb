# SPDX-License-Identifier: Apache-2.0
"""How tensors are handed to `msdda_fast._C`: addresses, dtype codes and sizes.

The extension does not link libtorch and holds no references: the caller keeps every tensor alive
until the call returns. On a GPU that is before the kernel has run; memory freed then is reused only
by later work on the same stream.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

__all__ = [
    "ABSENT",
    "CODES",
    "array",
    "channel_strides",
    "counter",
    "missing",
    "queue",
    "sizes",
    "strided",
]

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # storage.h
ABSENT = (0, 0)


@cache
def missing(device_type: str) -> str:
    """Return why the compiled kernels cannot run on "cpu" or "cuda"; empty if they can.

    Whether the device exists is not checked: a tensor on it is proof enough.
    """
    if device_type not in ("cpu", "cuda"):
        return f"there are no compiled kernels for {device_type!r}"
    try:
        extension = import_module("msdda_fast._C")
    except ImportError as error:
        return (
            f"the compiled module msdda_fast._C is missing ({error}); install a C++17 compiler "
            "and run `pip install .` again"
        )
    if device_type == "cuda" and not extension.cuda_built:
        return (
            "msdda_fast._C was compiled without CUDA kernels as no working nvcc was found; put "
            "one on PATH or set CUDA_HOME and run `MSDDA_BUILD_CUDA=1 pip install .` again"
        )
    return ""


def array(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype code of a contiguous tensor, or `ABSENT`."""
    return ABSENT if tensor is None else (tensor.data_ptr(), CODES[tensor.dtype])


def sizes(tensor: Tensor) -> tuple[int, int, int]:
    """Batch, channels and pixels of (B, C, ...); (B,) has one channel and one pixel."""
    batch = tensor.shape[0]
    channels = tensor.shape[1] if tensor.ndim > 1 else 1
    return batch, channels, tensor.numel() // max(batch * channels, 1)


def channel_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Strides of channel and pixel of (B, C, ...) if it is dense, NCHW or NHWC; else None."""
    axes = list(zip(shape, strides, strict=True))
    channels = shape[1] if len(shape) > 1 else 1
    pixels = 1
    for n in shape[2:]:
        pixels *= n
    if 0 in shape or _is_row_major(axes):
        return pixels, 1
    if _is_row_major([axes[0], *axes[2:], *axes[1:2]]):
        return 1, channels
    return None


def _is_row_major(axes: Sequence[tuple[int, int]]) -> bool:
    expected = 1
    for n, stride in reversed(axes):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def strided(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address, dtype code and `channel_strides` of a dense tensor; zeros if absent."""
    if tensor is None:
        return (0, 0, 0, 0)
    strides = channel_strides(tensor.shape, tensor.stride())
    assert strides is not None, (tensor.shape, tensor.stride())
    return (tensor.data_ptr(), CODES[tensor.dtype], *strides)


def counter(step: int | Tensor) -> tuple[int, int]:
    """Address (0: none) and value of a step index: a tensor is read by the kernel, never here."""
    return (step.data_ptr(), 0) if isinstance(step, Tensor) else (0, step)


def queue(tensor: Tensor) -> tuple[int, int]:
    """Index of the device of a CUDA tensor, and the handle of the current stream there."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream

# SPDX-License-Identifier: Apache-2.0
"""How tensors are handed to `msdda_fast._C`: addresses, dtype codes and sizes.

The extension links no libtorch, so nothing in it counts references: a caller keeps every tensor
alive until the call returns.
"""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

__all__ = ["ABSENT", "CODES", "array", "missing", "sizes"]

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # dtypes.h
ABSENT = (0, 0)


@cache
def missing(device_type: str) -> str:
    """What keeps the compiled kernels from running on "cpu" or "cuda"; empty if nothing does.

    Says nothing about the device itself: a tensor on it is proof enough.
    """
    if device_type not in ("cpu", "cuda"):
        return f"there are no compiled kernels for {device_type!r}"
    try:
        extension = import_module("msdda_fast._C")
    except ImportError as error:
        return (
            f"the compiled module msdda_fast._C is not there ({error}); install a C++17 compiler "
            "and run `pip install .` again"
        )
    if device_type == "cuda" and not getattr(extension, "cuda_built", False):
        return (
            "msdda_fast._C was compiled without CUDA kernels, no working nvcc was found then; put "
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

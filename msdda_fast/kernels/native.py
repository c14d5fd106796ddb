# SPDX-License-Identifier: Apache-2.0
"""How tensors are handed to `msdda_fast._C`: addresses, dtype codes and sizes.

The extension links no libtorch, so nothing in it counts references: a caller keeps every tensor
alive until the call returns.
"""

import torch
from torch import Tensor

__all__ = ["ABSENT", "CODES", "array", "sizes"]

CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # dtypes.h
ABSENT = (0, 0)


def array(tensor: Tensor | None) -> tuple[int, int]:
    """Address and dtype code of a contiguous tensor, or `ABSENT`."""
    return ABSENT if tensor is None else (tensor.data_ptr(), CODES[tensor.dtype])


def sizes(tensor: Tensor) -> tuple[int, int, int]:
    """Batch, channels and pixels of (B, C, ...); (B,) has one channel and one pixel."""
    batch = tensor.shape[0]
    channels = tensor.shape[1] if tensor.ndim > 1 else 1
    return batch, channels, tensor.numel() // max(batch * channels, 1)

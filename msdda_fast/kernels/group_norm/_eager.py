# SPDX-License-Identifier: Apache-2.0
"""Group norm in plain torch: the definition."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["run"]


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """See `kernels.raw.GroupNormBackend`."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = functional.group_norm(x, groups, weight, bias, eps)
    y = y.contiguous(memory_format=torch.channels_last)
    return functional.silu(y, inplace=True) if silu else y

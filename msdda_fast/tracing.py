# SPDX-License-Identifier: Apache-2.0
"""Whether the values of a tensor may be looked at now."""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.torch_private import in_dispatch_mode, is_batched

__all__ = ["is_watched", "values_are_readable"]


def values_are_readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at without a device sync, a graph break or a fake tensor.

    True for plain CPU tensors that nothing traces; False for FakeTensor and other subclasses, and
    under `vmap`, where a tensor stands for many.
    """
    return tensor.device.type == "cpu" and not is_watched(tensor) and not is_batched(tensor)


def is_watched(tensor: Tensor) -> bool:
    """Whether a tracer sees this tensor: `torch.compile`, a tensor subclass or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or in_dispatch_mode()
    )

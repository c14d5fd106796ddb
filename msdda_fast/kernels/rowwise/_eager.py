# SPDX-License-Identifier: Apache-2.0
"""Sums, layer norms and gates of rows in plain torch: the definition."""

from torch import Tensor
from torch.nn import functional

__all__ = ["geglu", "sum_and_norm", "sum_of"]


def sum_of(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels.raw.RowwiseBackend`."""
    return a + b if bias is None else a + (b + bias)


def sum_and_norm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.raw.RowwiseBackend`."""
    total = sum_of(a, b, bias)
    return total, functional.layer_norm(total, total.shape[-1:], weight, shift, eps)


def geglu(x: Tensor) -> Tensor:
    """See `kernels.raw.RowwiseBackend`."""
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)

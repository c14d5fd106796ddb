# SPDX-License-Identifier: Apache-2.0
"""What lies between the matrix products of a batched forward, in plain torch or in our kernels.

On a GPU the time of a small kernel is its launch. `FusedOps` launches far fewer than `PlainOps` for
the same result, rounded less often; see docs/how-it-works.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from msdda_fast.batched.options import saves_launches
from msdda_fast.batched.rows import Rows, add
from msdda_fast.kernels import registry

__all__ = ["FusedOps", "PlainOps", "choose_ops"]


def choose_ops(fused: bool | None, dtype: torch.dtype, device: torch.device) -> PlainOps:
    """Return the fused ones if asked for, or, with None, where that saves launches."""
    if not (saves_launches(dtype, device) if fused is None else fused):
        return PlainOps()
    # Triton's sums are float32
    return FusedOps("eager" if dtype == torch.float64 else "auto", device.type)


class PlainOps:
    """One operator of torch after the other.

    Attributes:
        takes_biases: Whether layers leave their biases to what follows, where that is cheaper.
    """

    takes_biases = False

    def group_norm(
        self, norm: nn.GroupNorm, rows: Rows, *, silu: bool, shift: Rows | None = None
    ) -> Rows:
        """Group norm of rows (D, C, h, w) + shift (D | 1, C, 1, 1), then SiLU if `silu`.

        The memory layout of the input is kept before SiLU, which CUDA's norm may change.
        """
        if shift is not None:
            rows = add(rows, shift)
        y: Tensor = norm(rows.x)
        if not silu:
            return rows.holding(y)
        if rows.x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
        return rows.holding(functional.silu(y, inplace=True))

    def add(self, a: Rows, b: Rows, bias: Tensor | None = None) -> Rows:
        """a + b + bias, of pictures; `bias` (C,) only if `takes_biases`."""
        return add(a, b)

    def add_and_norm(
        self, a: Rows, b: Rows, norm: nn.LayerNorm, bias: Tensor | None = None
    ) -> tuple[Rows, Rows]:
        """a + b + bias, of tokens, and its layer norm; `bias` as in `add`."""
        rows = add(a, b)
        return rows, rows.holding(norm(rows.x))

    def geglu(self, rows: Rows) -> Rows:
        """value * gelu(gate) of tokens (D, L, 2 C) = [value, gate]."""
        value, gate = rows.x.chunk(2, dim=-1)
        return rows.holding(value * functional.gelu(gate))


class FusedOps(PlainOps):
    """Kernels that each do what `PlainOps` does with several.

    Args:
        backend: Backend of `kernels.group_norm` and `kernels.rowwise`.
        device_type: Of the network.
    """

    takes_biases = True

    def __init__(self, backend: str, device_type: str) -> None:
        self._norm = registry.resolve("group_norm", backend, device_type).run
        rowwise = registry.resolve("rowwise", backend, device_type)
        # functions, since a module cannot be copied with a pipeline
        self._sum_of, self._sum_and_norm = rowwise.sum_of, rowwise.sum_and_norm
        self._geglu = rowwise.geglu

    def group_norm(
        self, norm: nn.GroupNorm, rows: Rows, *, silu: bool, shift: Rows | None = None
    ) -> Rows:
        """As in `PlainOps`, in channels_last whatever the layout of the input."""
        own = shift is not None and shift[1:] == rows[1:] and len(shift.x) == len(rows.x)
        if shift is not None and len(shift.x) > 1 and not own:
            rows, shift = add(rows, shift), None  # one for all rows of an objective, say
        x = rows.x.contiguous(memory_format=torch.channels_last)
        by_row = None if shift is None else shift.x.flatten(1)
        y = self._norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, by_row, silu)
        return rows.holding(y)

    def add(self, a: Rows, b: Rows, bias: Tensor | None = None) -> Rows:
        a, b = _alike(a, b)
        pixels = self._sum_of(a.x.permute(0, 2, 3, 1), b.x.permute(0, 2, 3, 1), bias)
        return a.holding(pixels.permute(0, 3, 1, 2))

    def add_and_norm(
        self, a: Rows, b: Rows, norm: nn.LayerNorm, bias: Tensor | None = None
    ) -> tuple[Rows, Rows]:
        a, b = _alike(a, b)
        total, y = self._sum_and_norm(a.x, b.x, bias, norm.weight, norm.bias, norm.eps)
        return a.holding(total), a.holding(y)

    def geglu(self, rows: Rows) -> Rows:
        return rows.holding(self._geglu(rows.x))


def _alike(a: Rows, b: Rows) -> tuple[Rows, Rows]:
    return a.expand(*b[1:]), b.expand(*a[1:])

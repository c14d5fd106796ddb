# SPDX-License-Identifier: Apache-2.0
"""Rows (M, K, B) that are kept apart only as far as they differ.

Until the first layer that treats objectives differently, or the first cross-attention, all rows of
an image are equal. A tensor therefore carries only the axes on which its rows differ so far, and is
widened when combined with a wider one or passed to a layer that needs more. Channels that are
innermost in memory stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdda_fast.kernels.grouped_lora import Site

__all__ = [
    "Layer",
    "Rows",
    "add",
    "apply",
    "apply_all",
    "concatenate",
    "hold",
    "hold_all",
    "objectives_of",
]

Layer = nn.Linear | nn.Conv2d | Site


class Rows(NamedTuple):
    """`x` (m k b, ...): m is M, or 1 while objectives share the rows; k is K or 1; b is B or 1."""

    x: Tensor
    objectives: int = 1
    branches: int = 1

    def holding(self, x: Tensor) -> Rows:
        """The same rows with content `x`."""
        return self._replace(x=x)

    def grid(self) -> Tensor:
        """View `x` as (m, k, b, ...)."""
        return self.x.view(self.objectives, self.branches, -1, *self.x.shape[1:])

    def expand(self, objectives: int = 1, branches: int = 1) -> Rows:
        """Repeat the rows if they have fewer objectives or branches than requested."""
        m, k = max(self.objectives, objectives), max(self.branches, branches)
        if (m, k) == (self.objectives, self.branches):
            return self
        inner = _channels_inner(self.x)
        grid = self.grid().movedim(3, -1) if inner else self.grid()
        x = grid.expand(m, k, *grid.shape[2:]).flatten(0, 2).contiguous()
        return Rows(x.movedim(-1, 1) if inner else x, m, k)


def objectives_of(*layers: nn.Module) -> int:
    """Return how many objectives the input of the layers must keep apart."""
    return max(layer.num_objectives if isinstance(layer, Site) else 1 for layer in layers)


def apply(layer: nn.Module, rows: Rows) -> Rows:
    """Run a layer on as few rows as it allows."""
    rows = rows.expand(objectives_of(layer))
    return rows.holding(layer(rows.x))


def apply_all(
    layers: Sequence[nn.Module], rows: Rows, *, together: bool = False, objectives: int = 1
) -> list[Rows]:
    """Run several layers on the same rows; their outputs get the same objectives.

    Args:
        layers: One or more.
        rows: What each of them takes.
        together: Give all of them the rows that the most demanding one needs.
        objectives: The least number that the outputs get.
    """
    if together:
        rows = rows.expand(objectives_of(*layers))
    outputs = [apply(layer, rows) for layer in layers]
    count = max(objectives, *(output.objectives for output in outputs))
    return [output.expand(count) for output in outputs]


def add(a: Rows, b: Rows) -> Rows:
    """Return a + b on the rows of the wider, in the memory layout of `a`."""
    m, k = max(a.objectives, b.objectives), max(a.branches, b.branches)
    if a[1:] == (m, k) and (len(b.x) == 1 or (b[1:] == (m, k) and len(a.x) == len(b.x))):
        return a.holding(a.x + b.x)
    return Rows((a.grid() + b.grid()).flatten(0, 2), m, k)


def concatenate(a: Rows, b: Rows) -> Rows:
    """Concatenate the channels of `a` and `b`, on the rows of the wider."""
    m, k = max(a.objectives, b.objectives), max(a.branches, b.branches)
    if a[1:] == b[1:]:
        return a.holding(torch.cat([a.x, b.x], dim=1))
    inner = _channels_inner(a.x)
    grids = [rows.grid().movedim(3, -1) if inner else rows.grid() for rows in (a, b)]
    wide = [grid.expand(m, k, *grid.shape[2:]) for grid in grids]
    x = torch.cat(wide, dim=-1 if inner else 3).flatten(0, 2)
    return Rows(x.movedim(-1, 1) if inner else x, m, k)


def hold_all(old: Sequence[Rows] | None, new: Sequence[Rows]) -> tuple[Rows, ...]:
    """`hold` of several."""
    kept: Sequence[Rows | None] = old or [None] * len(new)
    return tuple(hold(a, b) for a, b in zip(kept, new, strict=True))


def hold(old: Rows | None, new: Rows) -> Rows:
    """Return a dense copy of `new`, at the address of `old` if the shapes are equal."""
    if old is None or old.x.shape != new.x.shape:
        return new.holding(new.x.clone(memory_format=torch.contiguous_format))
    old.x.copy_(new.x)
    return new.holding(old.x)


def _channels_inner(x: Tensor) -> bool:
    """Whether a picture is in channels_last; one that is both dense formats counts as NCHW."""
    return (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )

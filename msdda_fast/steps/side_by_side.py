# SPDX-License-Identifier: Apache-2.0
"""Coefficients of several requests as those of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.pixels import PixelTable

__all__ = ["side_by_side"]


def side_by_side(tables: Sequence[CoefficientTable]) -> CoefficientTable:
    """Join tables (T, B_i, C) of the same steps and objectives into one (T, B, C).

    If one has weights of every pixel, all get them: requests without masks then have their fused
    step in the place of the first objective's mean, with all of the weight.

    Args:
        tables: One or more, on one device; with weights of every pixel, of latents of one size.
    """
    with_pixels = [table.pixels for table in tables if table.pixels is not None]
    pixels = None
    if with_pixels:
        like = with_pixels[0]
        parts = [
            _everywhere(table, like) if table.pixels is None else table.pixels for table in tables
        ]
        size = [max(axis) for axis in zip(*(part.rest.shape[1:] for part in parts), strict=True)]
        pixels = PixelTable(
            means=torch.cat([part.means for part in parts], 2),
            numbers=torch.cat([part.numbers for part in parts], 3),
            own=torch.cat([part.own.expand(*part.own.shape[:2], *size) for part in parts], 1),
            rest=torch.cat([part.rest.expand(-1, *size) for part in parts]),
            parts=torch.cat([part.parts for part in parts], 2),
        )
    return replace(
        tables[0],
        rows=torch.cat([table.rows for table in tables], dim=1),
        share=torch.cat([table.share for table in tables], dim=1),
        std=torch.cat([table.std for table in tables], dim=1),
        needs_uncond=any(table.needs_uncond for table in tables),
        influence=torch.stack([table.influence for table in tables]).any(0),
        reads=torch.stack([table.reads for table in tables]).any(0),
        pixels=pixels,
    )


def _everywhere(table: CoefficientTable, like: PixelTable) -> PixelTable:
    """A table without weights of pixels as one with, for as many objectives as `like` has."""
    count, (steps, batch, _) = len(like.own), table.rows.shape
    rows, axes = table.rows, (1,) * (like.rest.ndim - 1)
    means = rows.new_zeros(count, *rows.shape)
    means[0] = rows
    means[0, ..., table[0].layout.noise_scale] = 0.0
    numbers = rows.new_zeros(steps, 3, count, batch)
    numbers[:, 0] = (table.std**2).to(rows)[:, None]
    numbers[:, 2, 0] = 1.0
    parts = table.share.new_zeros(count, *table.share.shape)
    parts[0] = table.share
    return PixelTable(
        means=means,
        numbers=numbers,
        own=rows.new_zeros(count, batch, *axes),
        rest=rows.new_ones(batch, *axes),
        parts=parts,
    )

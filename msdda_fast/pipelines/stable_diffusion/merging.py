# SPDX-License-Identifier: Apache-2.0
"""At which shares adapters are merged: those at which the step is right to first order in them.

The exact mean is `A x + sum_i a_i m_i`, with `a_i = s_i share_i B_i` of each output, so one network
for all of them has the adapters at `c_i = a_i / sum_j a_j`. These differ from Eq. 7's shares where
etas do, because B depends on eta, and change from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.steps.coefficients import CoefficientTable, Layout

__all__ = ["merged_shares", "output_counts"]

#: Shares that have changed by less stay as they were: to merge again takes a part of a step.
TOLERANCE = 0.005


def output_counts(table: CoefficientTable) -> Tensor:
    """Return a_i, what each output counts in a step if x_0 is not clipped, (T, B, M) float64.

    With guidance that is the sum of both branches.
    """
    layout = Layout(table.num_objectives, table.clip_range is not None)
    rows = table.rows.to("cpu", torch.float64)
    counts = rows[..., layout.uncond] + rows[..., layout.cond]
    if layout.clips:
        clean = rows[..., layout.x0_uncond] + rows[..., layout.x0_cond]
        counts = counts + rows[..., layout.x0_scale] * clean
    return counts


def merged_shares(table: CoefficientTable) -> Tensor:
    """Return c_i up to `TOLERANCE`, (T, B, M) float64 on the host, with sum 1 over M.

    Where outputs do not count at all, the shares are Eq. 7's.
    """
    counts = output_counts(table)
    total = counts.sum(-1, keepdim=True)
    shares = torch.where(total == 0, table.share, counts / total)
    for k in range(1, len(shares)):
        moved = (shares[k] - shares[k - 1]).abs().amax(-1, keepdim=True)
        ends = (shares[k] == 0) != (shares[k - 1] == 0)  # an objective comes in, or leaves
        keeps = (moved < TOLERANCE) & ~ends.any(-1, keepdim=True)
        shares[k] = torch.where(keeps, shares[k - 1], shares[k])
    return shares

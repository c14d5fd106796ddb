# SPDX-License-Identifier: Apache-2.0
"""Resampling of weighted particles: their effective number, and which of them survive."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_size", "systematic"]


def effective_size(log_weights: Tensor) -> Tensor:
    """Return the effective sample size `(sum W)^2 / sum W^2` in [1, P], (B,), of log W (P, B)."""
    size: Tensor = 1 / log_weights.softmax(0).square().sum(0)
    return size


def systematic(log_weights: Tensor, u: Tensor) -> Tensor:
    """Return ancestors (P, B) int64 by systematic resampling, ascending along P.

    Particle p has `P W_p / sum W` children on average over u, and always within 1 of that number.

    Args:
        log_weights: log W, (P, B) float64.
        u: One number in (0, 1) per sample, (B,).
    """
    count = len(log_weights)
    cumulative = log_weights.softmax(0).cumsum(0).T.contiguous()
    ranks = torch.arange(count, device=u.device)
    points = (u.double()[:, None] + ranks) / count
    # the last sum may fall short of 1 by rounding
    return torch.searchsorted(cumulative, points).clamp(max=count - 1).T

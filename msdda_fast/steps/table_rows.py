# SPDX-License-Identifier: Apache-2.0
"""The columns of coefficient rows, for shares of objectives and the Gaussians of their steps."""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.steps.coefficients import Layout
from msdda_fast.steps.rules import StepTerms
from msdda_fast.steps.strength import Folding

__all__ = ["step_rows"]


def step_rows(
    share: Tensor, std: Tensor, terms: StepTerms, guidance: Tensor, fold: Folding | None
) -> Tensor:
    """Return rows (T, B, C), float64 on the host; see `coefficients.Layout`.

    Args:
        share: What each mean counts, (T, B, M).
        std: sigma_w, (T, B), latent units.
        terms: The objectives' Gaussians.
        guidance: g, (M,) or (B, M).
        fold: What the base contributes, as one more objective at the end; None: nothing.
    """
    output_scale = share * terms.output_scale
    x_scale = (share * terms.x_scale).sum(-1)
    uncond, cond = output_scale * (1 - guidance), output_scale * guidance
    if fold is not None:
        uncond, cond = fold.columns(uncond), fold.columns(cond)
    layout = Layout(cond.shape[-1], clips=terms.clean is not None)
    rows = torch.zeros(*share.shape[:2], layout.width, dtype=torch.float64)
    rows[..., layout.x_scale] = x_scale
    rows[..., layout.uncond] = uncond
    rows[..., layout.cond] = cond
    rows[..., layout.noise_scale] = std
    if (clean := terms.clean) is not None:
        output = torch.where(share != 0, clean.output, 0.0)
        rows[..., layout.x0_x] = clean.x[..., 0]
        rows[..., layout.x0_uncond] = output * (1 - guidance)
        rows[..., layout.x0_cond] = output * guidance
        rows[..., layout.x0_scale] = clean.scale * share
    return rows

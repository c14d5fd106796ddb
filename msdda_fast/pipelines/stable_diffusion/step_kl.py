# SPDX-License-Identifier: Apache-2.0
r"""How far different predictions move a reverse step: the KL divergence of two Gaussians.

    KL_t = |mu_w' - mu_w|^2 / (2 sigma_w^2),    mu_w' - mu_w = sum_i share_i B_i (m_i' - m_i),

in nats. Over a trajectory they add up to the divergence of the two path measures, when the steps'
divergences are averaged over trajectories of the first (the chain rule).
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.engine.step import Outputs
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.steps.coefficients import StepCoefficients

__all__ = ["step_kl"]


def step_kl(
    x_t: Tensor, outputs: Outputs, others: Outputs, coefficients: StepCoefficients, std: Tensor
) -> Tensor:
    """Return the KL of the step on `outputs` from the step on `others`, both from one state.

    Guidance and x_0 clipping are part of the step. Where sigma_w = 0 the KL is infinite, unless the
    means are equal.

    Args:
        x_t: (B, C, h, w) latents.
        outputs, others: Raw outputs of M objectives, (M, K, B, C, h, w) or a sequence.
        coefficients: Coefficients of the step.
        std: sigma_w, (B,) or (1,), latent units.

    Returns: (B,) nats, float32 or wider.
    """
    none = torch.zeros_like(x_t)
    mean, other = (
        fused_ddim_step(x_t, predicted, coefficients, noise=none) for predicted in (outputs, others)
    )
    distance = (mean - other).square().flatten(1).sum(1)
    variance = std.to(distance).square()
    return (distance / (2 * variance)).masked_fill(distance == 0, 0.0)

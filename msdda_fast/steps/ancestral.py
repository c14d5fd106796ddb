# SPDX-License-Identifier: Apache-2.0
r"""The coefficients of fused Euler ancestral steps, in k-diffusion's variables x = x_0 + sigma eps.

From s = sigma_t to r = sigma_prev, Euler ancestral of denoiser D_i at eta_i is the kernel

    up_i = min(r, eta_i u),   u = r sqrt(1 - r^2 / s^2),   down_i = sqrt(r^2 - up_i^2),
    mu_i = x + (down_i - s) (x - D_i) / s = (down_i / s) x + (1 - down_i / s) D_i,
    p_i(x_prev | x) = N(mu_i, up_i^2),

affine in x and D_i. With sigma^2 = (1 - alpha_bar) / alpha_bar and x = x_vp / sqrt(alpha_bar), u^2
is DDIM's posterior variance v over alpha_bar_prev, and mu_i is DDIM's mean over its root: for
eta <= 1, where min(r, .) never binds, Euler ancestral *is* DDIM at the same eta, and so are their
fusions.

All up_i share the factor u, so the shares of Eq. 7 need only the relative deviations

    c_i = up_i / u = min(eta_i, s / sqrt(s^2 - r^2)),
    share_i = (w_i / c_i^2) / sum_j w_j / c_j^2,

which stay defined at r = 0, where c_i = min(eta_i, 1) and the step goes to sum_i share_i D_i. They
depend on the step only where some eta_i > 1 is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.steps.coefficients import StepCoefficients
from msdda_fast.steps.shares import fusion_shares
from msdda_fast.weights import as_host_float64, preference_schedule

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule, ZeroVariancePolicy

__all__ = ["AncestralSteps", "ancestral_steps"]


@dataclass(frozen=True, slots=True)
class AncestralSteps:
    """T fused Euler ancestral steps in sampling order; `steps[k]` is what step k's kernel takes.

    Attributes:
        rows: (T, B, 2M + 2) in the compute dtype and on the compute device; the linear layout of
            `StepCoefficients`, where a denoised x_0 stands for the conditional output.
        share: (T, B, M) float64 on the host, the fusion weights of means, sum 1 over M.
        std: (T, B) float64 on the host, sigma_w in latent units.
    """

    rows: Tensor
    share: Tensor
    std: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, k: int) -> StepCoefficients:
        return StepCoefficients(self.rows[k], self.share.shape[-1], None)

    def denoised(self, k: int) -> StepCoefficients:
        """The coefficients of `sum_i share_i D_i` at step k, the x_0 that the step heads for."""
        row = torch.zeros_like(self.rows[k])
        row[:, -1 - self.share.shape[-1] : -1] = self.share[k].to(row)
        return StepCoefficients(row, self.share.shape[-1], None)


def ancestral_steps(
    sigmas: Tensor | Sequence[float],
    batch_size: int,
    *,
    etas: Sequence[float] | Tensor,
    weights: WeightSchedule = None,
    s_noise: float = 1.0,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> AncestralSteps:
    """Build the coefficients of T fused Euler ancestral steps (Eq. 7).

    Args:
        sigmas: (T + 1,) noise levels in latent units, T >= 1, not increasing, positive but for the
            last, which may be 0.
        batch_size: B.
        etas: (M,), stochasticity of each denoiser, >= 0; above 1 it is clipped as in k-diffusion.
        weights: Preferences: None (uniform), (M,), (B, M) or (T, B, M), rows on the simplex, or a
            callable from the step index k = 0..T-1 to any of the first three.
        s_noise: Factor on every sigma_i, no unit, >= 0; shares do not depend on it.
        zero_variance: What to do when a sample mixes eta = 0 with eta > 0; see
            `schedule.fusion_shares`.
        rates: (M,) > 0, the rates of "ratio".
        extrapolate: Accept negative weights while the total precision stays positive.
        device: Where `rows` go; the CPU by default.
        dtype: Of `rows`: float32, or float64 for a float64 state.

    Raises:
        InvalidSchedule: Sigmas, an eta or s_noise outside of the ranges above.
        InvalidShape: `sigmas` is not (T + 1,), `etas` not (M,), or `weights` of another shape.
        InvalidWeights, ZeroVariance: See `schedule.fusion_shares`.
    """
    levels = as_host_float64(sigmas, "sigmas")
    if levels.ndim != 1 or len(levels) < 2:
        raise InvalidShape(f"sigmas have shape {tuple(levels.shape)}, expected (T + 1,), T >= 1")
    start, end = levels[:-1, None], levels[1:, None]
    if not (levels.isfinite().all() and (start > 0).all() and (end >= 0).all()):
        raise InvalidSchedule(
            f"sigmas must be finite, and positive but for a last 0, got {levels.tolist()}"
        )
    if (end > start).any():
        raise InvalidSchedule(f"sigmas must not increase, got {levels.tolist()}")
    eta = as_host_float64(etas, "etas")
    if eta.ndim != 1 or not len(eta):
        raise InvalidShape(f"etas have shape {tuple(eta.shape)}, expected (M,)")
    if not (eta.isfinite() & (eta >= 0)).all():
        raise InvalidSchedule(f"etas must be finite and not negative, got {eta.tolist()}")
    if not 0 <= s_noise < float("inf"):
        raise InvalidSchedule(f"s_noise must be finite and not negative, got {s_noise!r}")
    weight = preference_schedule(weights, len(eta), batch_size, len(start), extrapolate=extrapolate)

    spread = torch.minimum(eta, (1 - (end / start) ** 2).rsqrt())  # (T, M): c_i
    fused = [
        fusion_shares(w, c, zero_variance=zero_variance, rates=rates)
        for w, c in zip(weight, spread, strict=True)
    ]
    share = torch.stack([share for share, _ in fused])
    unit = end * (1 - (end / start) ** 2).sqrt()  # (T, 1): u
    std = s_noise * unit * torch.stack([spread_w for _, spread_w in fused])
    up = torch.minimum(end, eta * unit)  # not spread * unit: a clipped down_i is exactly 0
    down = (end**2 - up**2).sqrt()
    kept = (down / start)[:, None]  # (T, 1, M): of x in mu_i
    columns = [
        (share * kept).sum(-1, keepdim=True),
        torch.zeros_like(share),
        share * (1 - kept),
        std[..., None],
    ]
    rows = torch.cat(columns, dim=-1).to(device=device, dtype=dtype)
    return AncestralSteps(rows, share, std)

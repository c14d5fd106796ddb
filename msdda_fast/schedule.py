# SPDX-License-Identifier: Apache-2.0
r"""From scheduler settings, etas and preference weights to the coefficients of one fused step.

With `a = alpha_bar_t`, `p = alpha_bar_prev`, the DDIM posterior of objective i is

    v = (1 - p) / (1 - a) * (1 - a / p),        sigma_i = eta_i sqrt(v),
    mu_i = sqrt(p) x0hat_i + sqrt(1 - p - sigma_i^2) epshat_i = A_i x_t + B_i m_i,

affine in x_t and the guided output `m_i = u_i + g_i (c_i - u_i)`. All sigma_i share the factor v,
so the fusion weights of Eq. 7 are time-free shares, defined even where v = 0:

    share_i = (w_i / eta_i^2) / sum_j w_j / eta_j^2,      eta_w^2 = 1 / sum_j w_j / eta_j^2,
    x_prev = (sum_i share_i A_i) x_t + sum_i share_i B_i m_i + eta_w sqrt(v) z.

Everything is float64 on the host and is cast once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.coefficients import CoefficientTable, StepCoefficients
from msdda_fast.ddim_grid import ddim_grid
from msdda_fast.errors import InvalidSchedule, InvalidShape, InvalidWeights, ZeroVariance
from msdda_fast.objective import as_host_float64, check_eta, preference_schedule

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler, ZeroVariancePolicy

__all__ = ["CoefficientTable", "StepCoefficients", "coefficient_table", "fusion_shares"]


def coefficient_table(
    scheduler: Scheduler,
    num_steps: int,
    *,
    etas: Sequence[float] | Tensor,
    weights: Sequence[Any] | Tensor | None,
    guidance_scale: float | Sequence[float] | Tensor = 1.0,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> CoefficientTable:
    """Build the coefficients of Algorithm 1 (Eq. 7) over the DDIM kernels of M objectives.

    Reads `alphas_cumprod` and the config of a diffusers DDIM scheduler: prediction type epsilon,
    v_prediction or sample; any timestep spacing; `set_alpha_to_one`; `clip_sample`. The scheduler
    is copied, never changed. As in diffusers, a step goes from t to `t - num_train // num_steps`.

    Args:
        scheduler: `diffusers.DDIMScheduler`, or anything with its config and `alphas_cumprod`.
        num_steps: T, in [1, num_train_timesteps].
        etas: (M,), DDIM stochasticity of each objective, in [0, 1].
        weights: Preferences (M,), (B, M) or (T, B, M), rows on the simplex; None is uniform.
        guidance_scale: g, a number, (M,) or (B, M); 1 is no guidance.
        zero_variance: What to do when a sample mixes eta = 0 with eta > 0; see `fusion_shares`.
        rates: (M,) > 0, the relative rates c_i of `zero_variance="ratio"`.
        extrapolate: Accept negative weights while the total precision stays positive.
        device: Where `rows` and `timesteps` go; the CPU by default.
        dtype: Of `rows`: float32, or float64 for a float64 state.

    Returns:
        The table; B is 1 when neither weights nor guidance have a batch axis.

    Raises:
        InvalidSchedule: An eta, guidance scale, number of steps or scheduler setting is outside the
            range above, or not one the affine kernel can express.
        InvalidWeights: Weights off the simplex, or a total precision that is not positive.
        InvalidShape: `weights`, `etas`, `rates` or `guidance_scale` of another shape.
        ZeroVariance: A sample mixes eta = 0 with eta > 0 under `zero_variance="error"`.
    """
    eta = _etas(etas)
    count = eta.numel()
    guidance = _guidance(guidance_scale, count)
    grid = ddim_grid(scheduler, num_steps)
    batch = _batch_size(weights, guidance)
    weight = preference_schedule(weights, count, batch, num_steps, extrapolate=extrapolate)
    share, eta_w = fusion_shares(weight, eta, zero_variance=zero_variance, rates=rates)

    var = grid.var[:, None]
    x0_x, x0_m, eps_x, eps_m = (term[:, None, None] for term in grid.prediction_terms())
    x0_scale = grid.alpha_bar_prev.sqrt()[:, None, None] * share
    # 1 - p - sigma^2 >= 0 holds for eta <= 1, up to rounding
    direction = (1 - grid.alpha_bar_prev[:, None] - eta**2 * var).clamp(min=0).sqrt()
    eps_scale = direction[:, None, :] * share

    x_scale = eps_scale * eps_x
    output_scale = eps_scale * eps_m
    if grid.clip_range is None:
        x_scale = x_scale + x0_scale * x0_x
        output_scale = output_scale + x0_scale * x0_m
    std = eta_w * var.sqrt()
    columns = [
        x_scale.sum(-1, keepdim=True),
        output_scale * (1 - guidance),
        output_scale * guidance,
        std[..., None],
    ]
    if grid.clip_range is not None:
        masked_x0_m = torch.where(share != 0, x0_m, 0.0)
        columns += [
            x0_x.expand_as(columns[0]),
            masked_x0_m * (1 - guidance),
            masked_x0_m * guidance,
            x0_scale,
        ]
    return CoefficientTable(
        rows=torch.cat(columns, dim=-1).to(device=device, dtype=dtype),
        timesteps=grid.timesteps.to(device=device),
        num_objectives=count,
        clip_range=grid.clip_range,
        share=share,
        std=std,
        needs_uncond=bool(((share != 0) & (guidance != 1)).any()),
    )


def fusion_shares(
    weights: Tensor,
    etas: Tensor,
    *,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `share_i = (w_i / eta_i^2) / sum_j w_j / eta_j^2` and `eta_w`, with their limits.

    Objectives of weight 0 are dropped first. When every remaining eta is 0 the shares are the
    weights, the limit of equal etas. When some are 0 and some are not, the product of experts has
    no limit that all paths share, and `zero_variance` decides; the step is then deterministic:

    - "error": raise `ZeroVariance`;
    - "dominate": the literal limit, objectives with eta = 0 decide, `share_i ~ w_i` among them;
    - "ratio": likewise, vanishing at the given relative rates, `share_i ~ w_i / c_i^2` among them
      (also when every eta is 0).

    Args:
        weights: (..., M) float64 on the host, sum 1 over M; negative entries extrapolate.
        etas: (M,) float64 on the host, in [0, 1].
        zero_variance: The policy.
        rates: (M,) > 0, with "ratio" and only then.

    Returns:
        `share` (..., M), sum 1 over M, and `eta_w` (...), both without unit.

    Raises:
        ZeroVariance: Under "error", a row mixes eta = 0 and eta > 0.
        InvalidWeights: A row leaves no positive total precision.
        InvalidSchedule: An unknown policy, or rates that are missing, not positive or unused.
        InvalidShape: `rates` is not (M,).
    """
    limit_rates = _limit_rates(zero_variance, rates, etas)
    active = weights != 0
    zero = active & (etas == 0)
    degenerate = zero.any(-1, keepdim=True)
    if zero_variance == "error" and (mixed := degenerate & (zero != active)).any():
        row = weights[mixed.any(-1)][0].tolist()
        raise ZeroVariance(
            f"etas {etas.tolist()} with weights {row} mix zero and positive variance, which has no "
            f"unique limit; use etas all 0 or all positive, or zero_variance='dominate' (those "
            f"with eta = 0 decide) or 'ratio' (likewise, with shares w_i / rates_i^2)"
        )
    deciding = torch.where(degenerate, zero, active)
    spread = torch.where(degenerate, limit_rates, etas)
    # relative precisions (s_min / s_i)^2 <= 1: no overflow at any eta, and exact in the limit
    smallest = spread.masked_fill(~deciding, torch.inf).amin(-1, keepdim=True)
    precision = torch.where(deciding, weights * (smallest / spread) ** 2, 0.0)
    total = precision.sum(-1, keepdim=True)
    if not (total > 0).all():
        index = (~(total > 0)).any(-1).nonzero()[0].tolist()
        raise InvalidWeights(
            f"weights {weights[tuple(index)].tolist()} with etas {etas.tolist()} leave the total "
            f"precision sum w_i / eta_i^2 at or below 0; it must be positive"
        )
    eta_w = torch.where(degenerate, 0.0, smallest / total.sqrt())
    return precision / total, eta_w.squeeze(-1)


def _limit_rates(
    policy: ZeroVariancePolicy, rates: Sequence[float] | Tensor | None, etas: Tensor
) -> Tensor:
    if policy not in (policies := ("error", "dominate", "ratio")):
        raise InvalidSchedule(f"zero_variance is {policy!r}, expected one of {policies}")
    if (rates is None) == (policy == "ratio"):
        raise InvalidSchedule(f"rates={rates!r} with zero_variance={policy!r}: 'ratio' takes rates")
    if rates is None:
        return torch.ones_like(etas)
    values = as_host_float64(rates, "rates")
    if values.shape != etas.shape:
        raise InvalidShape(
            f"rates have shape {tuple(values.shape)}, expected (M,) = {tuple(etas.shape)}"
        )
    if not ((values > 0) & values.isfinite()).all():
        raise InvalidSchedule(f"rates must be positive and finite, got {values.tolist()}")
    return values


def _etas(etas: Sequence[float] | Tensor) -> Tensor:
    values = as_host_float64(etas, "etas")
    if values.ndim != 1 or not len(values):
        raise InvalidShape(f"etas have shape {tuple(values.shape)}, expected (M,)")
    for index, eta in enumerate(values.tolist()):
        check_eta(eta, f"objective {index}")
    return values


def _guidance(guidance_scale: float | Sequence[float] | Tensor, count: int) -> Tensor:
    """Return g as (M,) or (B, M) float64."""
    values = as_host_float64(guidance_scale, "guidance_scale")
    if values.ndim > 2 or (values.ndim and values.shape[-1] != count):
        raise InvalidShape(
            f"guidance_scale has shape {tuple(values.shape)}, expected (), (M,) or (B, M) "
            f"with M = {count}"
        )
    if not values.isfinite().all():
        raise InvalidSchedule(f"guidance_scale must be finite, got {values.tolist()}")
    return values.expand(count) if values.ndim == 0 else values


def _batch_size(weights: Sequence[Any] | Tensor | None, guidance: Tensor) -> int:
    shapes = {"guidance_scale": tuple(guidance.shape)}
    if weights is not None:
        shapes["weights"] = tuple(as_host_float64(weights, "weights").shape)
    sizes = {shape[-2] for shape in shapes.values() if len(shape) > 1} - {1}
    if len(sizes) > 1:
        raise InvalidShape(f"weights and guidance_scale disagree on the batch size: {shapes}")
    return sizes.pop() if sizes else 1

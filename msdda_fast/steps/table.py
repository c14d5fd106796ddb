# SPDX-License-Identifier: Apache-2.0
r"""From scheduler settings, etas and preference weights to the coefficients of one fused step.

With `a = alpha_bar_t`, `p = alpha_bar_prev`, the DDIM posterior of objective i is

    v = (1 - p) / (1 - a) * (1 - a / p),        sigma_i = eta_i sqrt(v),
    mu_i = sqrt(p) x0hat_i + sqrt(1 - p - sigma_i^2) epshat_i = A_i x_t + B_i m_i,

affine in x_t and the guided output `m_i = u_i + g_i (c_i - u_i)`. All sigma_i share the factor v,
so the fusion weights of Eq. 7 are time-free shares, defined even where v = 0:

    share_i = (w_i / eta_i^2) / sum_j w_j / eta_j^2,      eta_w^2 = 1 / sum_j w_j / eta_j^2,
    x_prev = (sum_i share_i A_i) x_t + sum_i share_i B_i m_i + eta_w sqrt(v) z.

With `fusion="eps"` the predictions are mixed instead, and one step is taken at eta_w; see
`coefficient_table`. Everything is float64 on the host and is cast once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.objective import check_eta
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.ddim import DDIMGrid, ddim_grid
from msdda_fast.steps.shares import eps_mixture, fusion_shares
from msdda_fast.weights import as_host_float64, preference_schedule

if TYPE_CHECKING:
    from msdda_fast.types import Fusion, Scheduler, ZeroVariancePolicy

__all__ = ["coefficient_table"]


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
    fusion: Fusion = "posterior",
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
        fusion: "posterior" is Eq. 7. "eps" is one DDIM step at eta_w of the mixed predictions,

                epshat_w = sum_i what_i epshat_i,
                what_i = share_i B(eta_i) / sum_j share_j B(eta_j),

            where B(eta) = sqrt(1 - p - eta^2 v) - sqrt(p (1 - a) / a) is what a step makes of a
            prediction. The two are the same where etas are equal. Where they differ, Eq. 7 leaves
            a step with less noise than alpha_bar_prev stands for, by O(1/T); "eps" does not.
        device: Where `rows` and `timesteps` go; the CPU by default.
        dtype: Of `rows`: float32, or float64 for a float64 state.

    Returns:
        The table; B is 1 when neither weights nor guidance have a batch axis.

    Raises:
        InvalidSchedule: An eta, guidance scale, number of steps or scheduler setting is outside the
            range above, or not one the affine kernel can express; another fusion than those; or
            "eps" with x_0 clipping, where predictions cannot be mixed.
        InvalidWeights: Weights off the simplex, or a total precision that is not positive; with
            "eps" also extrapolated ones that leave eta_w > 1 or predictions that cancel.
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
    level = eta
    if _mixes_eps(fusion, grid):
        share, level = eps_mixture(grid, share, eta, eta_w), eta_w[..., None]

    var = grid.var[:, None, None]
    x0_x, x0_m, eps_x, eps_m = (term[:, None, None] for term in grid.prediction_terms())
    prev = grid.alpha_bar_prev[:, None, None]
    x0_scale = prev.sqrt() * share
    # 1 - p - sigma^2 >= 0 holds for eta <= 1, up to rounding
    eps_scale = (1 - prev - level**2 * var).clamp(min=0).sqrt() * share

    x_scale = eps_scale * eps_x
    output_scale = eps_scale * eps_m
    if grid.clip_range is None:
        x_scale = x_scale + x0_scale * x0_x
        output_scale = output_scale + x0_scale * x0_m
    std = eta_w * var[..., 0].sqrt()
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


def _mixes_eps(fusion: Fusion, grid: DDIMGrid) -> bool:
    if fusion not in (known := ("posterior", "eps")):
        raise InvalidSchedule(f"fusion is {fusion!r}, expected one of {known}")
    if fusion == "eps" and grid.clip_range is not None:
        raise InvalidSchedule(
            "fusion='eps' mixes predictions, of which a step with x_0 clipping (clip_sample=True) "
            "is no affine function; use fusion='posterior'"
        )
    return fusion == "eps"


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

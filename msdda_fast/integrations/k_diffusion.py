# SPDX-License-Identifier: Apache-2.0
"""Ancestral sampling of several denoisers at once, in k-diffusion's conventions.

It takes what `k_diffusion.sampling.sample_euler_ancestral` takes, with M denoisers in place of one,
and needs no k-diffusion to be installed:

    from k_diffusion.external import CompVisDenoiser
    from k_diffusion.sampling import get_sigmas_karras
    from msdda_fast.integrations.k_diffusion import sample_msdda

    models = [CompVisDenoiser(aesthetic), CompVisDenoiser(consistency)]
    sigmas = get_sigmas_karras(25, 0.03, 14.6)
    x = torch.randn(2, 4, 64, 64) * sigmas[0]
    x_0 = sample_msdda(
        models, x, sigmas, {"cond": cond}, weights=[0.3, 0.7], etas=[1.0, 0.8], seeds=[1, 2]
    )

With one weight at 1 it equals that sampler with that denoiser. `steps.ancestral` has the equations.
Flow models, x = (1 - sigma) x_0 + sigma eps, are sampled as ComfyUI's `sample_euler_ancestral_RF`
does (`flow=True`), or with the noise they were trained with: `levels=[FlowSDE(0.7), FlowSDE(0.4)]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from msdda_fast.engine.loop import EagerGeneration, run
from msdda_fast.engine.noise import noise_source
from msdda_fast.errors import InvalidShape
from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.levels import Levels, read_levels
from msdda_fast.steps.ancestral import ancestral_rule
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.denoised import denoised_flow_rule
from msdda_fast.steps.table import rule_table
from msdda_fast.weight_ranges import by_timestep, has_ranges

if TYPE_CHECKING:
    from msdda_fast.levels import NoiseLevels
    from msdda_fast.steps.rules import Rule
    from msdda_fast.types import Backend, SeedsLike, WeightSchedule, WeightsLike, ZeroVariancePolicy

__all__ = ["fused_tables", "sample_msdda"]

#: k-diffusion's denoiser: (x (B, *S), sigma (B,), **extra_args) -> denoised (B, *S).
KDenoiser: TypeAlias = Callable[..., Tensor]


@torch.no_grad()
def sample_msdda(
    models: Sequence[KDenoiser],
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    etas: Sequence[float] | Tensor | None = None,
    levels: NoiseLevels | None = None,
    flow: bool = False,
    weights: WeightSchedule = None,
    s_noise: float = 1.0,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    seeds: SeedsLike | None = None,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Sample from the product of experts of M Euler ancestral samplers (Algorithm 1, Eq. 7).

    `p_w(x_prev | x) ~ prod_i N(x + (down_i - sigma) d_i, up_i^2)^{w_i}`, with `d_i`, `down_i` and
    `up_i` those of k-diffusion's `sample_euler_ancestral(models[i], eta=etas[i])`; of flow models
    `sample_euler_ancestral_RF`, or the SDE of `levels`. A denoiser is called as
    `models[i](x, sigma, **extra_args)`, x (B, *S) and sigma (B,) in the dtype and on the device of
    `x`. It is not called at steps where no sample gives it weight. All share one z.

    Args:
        models: M callables that return the denoised x_0, (B, *S), guided if they want guidance.
        x: (B, *S), the noisy start, latent units: sigma_0 times a standard normal. The state keeps
            its dtype.
        sigmas: (T + 1,) noise levels, not increasing, in latent units; the last may be 0. Those of
            flow models decrease within [0, 1]. With fewer than two there is no step, and `x` is
            returned, as by k-diffusion's samplers.
        extra_args: Keyword arguments of every denoiser.
        callback: Called before each step's update with `x`, `i`, `sigma`, `sigma_hat` and
            `denoised`, here sum_i share_i D_i, (B, *S).
        disable: True hides the progress bar; None hides it when the output is not a terminal.
        etas: (M,), stochasticity of each denoiser, >= 0; in [0, 1] of flow models.
        levels: Instead of etas: the same, or the noise that flow models were trained with, such as
            `[FlowSDE(0.7), FlowSDE(0.4)]`, which says that these are flow models.
        flow: The models are flow models, x = (1 - sigma) x_0 + sigma eps in place of
            x_0 + sigma eps.
        weights: Preferences: None (uniform), (M,), (B, M) or (T, B, M), rows on the simplex; or of
            every pixel, a tensor (B, M, *S), each axis of S that of `x` or 1, and two of them or
            more. Or a mapping from ranges of sigma, both ends included, to these, such as
            `{(0.6, 1.0): [1, 0], (0.0, 0.6): [0.5, 0.5]}`; or a callable from the step index. Both
            may give all of these but (T, B, M).
        s_noise: Factor on the noise, no unit.
        noise_sampler: z of a step, (B, *S), from (sigma, sigma_next), as in k-diffusion; not called
            for a step to sigma 0 that adds no noise.
        seeds: Instead of `noise_sampler`: one 64-bit seed per sample, for counter-based noise. With
            neither: `torch.randn_like(x)`, as in k-diffusion.
        zero_variance: What to do when a sample mixes eta = 0 with eta > 0: "error", "dominate" or
            "ratio"; see `steps.shares.fusion_shares`.
        rates: (M,) > 0, the rates of "ratio".
        extrapolate: Accept negative weights while the total precision stays positive.
        backend: "auto", or one by name: "eager", "native" or "triton".

    Returns:
        x_0, (B, *S), latent units, in the dtype of `x`.

    Raises:
        InvalidShape: `x`, `sigmas`, `weights`, `etas`, `levels`, `seeds`, a denoised x_0 or a z has
            the wrong shape; or there is no denoiser.
        InvalidSchedule: Sigmas that increase, or leave [0, 1] for a flow model; a level out of its
            range; with weights of every pixel, levels of 0 beside others, or unequal ones of CPS.
        InvalidWeights, ZeroVariance: See `steps.shares.fusion_shares`; also ranges of sigma that
            overlap, or leave out one that is sampled.
        ValueError: Both `noise_sampler` and `seeds`, or both `etas` and `levels`.
        BackendUnavailable: The named backend cannot run here.
    """
    count = len(models)
    if count == 0 or x.ndim == 0 or not x.is_floating_point():
        raise InvalidShape(
            f"expected denoisers and a floating-point x (B, *S); got {count} denoisers and x of "
            f"{x.dtype} and shape {tuple(x.shape)}"
        )
    read = _levels(etas, levels, count)
    if sigmas.ndim == 1 and len(sigmas) < 2:
        return x
    tables = fused_tables(
        sigmas,
        read,
        weights,
        x.shape,
        flow=flow,
        s_noise=s_noise,
        zero_variance=zero_variance,
        rates=rates,
        extrapolate=extrapolate,
        device=x.device,
        dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
    )
    is_silent = [
        end == 0 and not table.adds_noise(k)
        for k, (table, end) in enumerate(zip(tables, sigmas[1:].tolist(), strict=True))
    ]

    def sampled(k: int) -> Tensor:
        if is_silent[k]:
            return torch.zeros_like(x)  # and neither sampler nor generator is asked
        z = noise_sampler and noise_sampler(sigmas[k], sigmas[k + 1])
        return torch.randn_like(x) if z is None else z

    own = seeds is None or noise_sampler is not None
    source = noise_source(
        x.shape, len(tables), x.device, seeds=seeds, noise_sampler=sampled if own else None
    )
    registry.resolve("fused_step", backend, x.device.type)  # a missing backend fails before work
    extra_args = {} if extra_args is None else extra_args
    is_active = [table.influence[k].tolist() for k, table in enumerate(tables)]
    s_in = x.new_ones([len(x)])

    def predict(x: Tensor, k: int) -> list[Tensor | None]:
        sigma = sigmas[k]
        outputs: list[Tensor | None] = [None] * count
        # to and fro: denoisers that swap weights to take turns swap M - 1 times a step, not M
        for m in range(count) if k % 2 else reversed(range(count)):
            if is_active[k][m]:
                outputs[m] = _denoised(models[m], m, x, sigma * s_in, extra_args)
        if callback is not None:
            # a coefficient of 0 masks its input, here the noise
            preview = fused_ddim_step(x, outputs, tables[k].mixture(k), noise=x, backend=backend)
            callback({"x": x, "i": k, "sigma": sigma, "sigma_hat": sigma, "denoised": preview})
        generation.replace_table(tables[k])
        return outputs

    noisy = next((table for table in tables if table.std.any()), tables[0])
    generation = EagerGeneration(predict, x, noisy, source, backend)
    with tqdm(total=len(tables), disable=disable) as bar:
        return run(generation, len(tables), lambda k: bar.update() is not False)


def fused_tables(
    sigmas: Tensor,
    levels: Levels,
    weights: WeightSchedule,
    shape: torch.Size,
    *,
    flow: bool,
    s_noise: float,
    **options: Any,  # noqa: ANN401 - those of `rule_table`
) -> list[CoefficientTable]:
    """Return T tables, of which step k uses the k-th: one, unless weights of every pixel change.

    Arguments and errors are those of `sample_msdda`, for `x` of shape (B, *S).
    """
    rule: Rule = ancestral_rule(sigmas, s_noise)
    if flow or levels.noise is not None:
        rule = denoised_flow_rule(sigmas, levels.noise, s_noise)
    options |= {"levels": levels.values, "batch_size": shape[0]}
    steps = range(len(rule.timesteps))
    if has_ranges(weights):
        weights = by_timestep(weights, rule.timesteps)
    each = [weights(k) if callable(weights) else weights for k in steps]
    of_pixels = [one for one in each if isinstance(one, Tensor) and one.ndim > 3]
    for one in of_pixels:
        axes = zip(one.shape[2:], shape[1:], strict=False)
        if one.ndim != len(shape) + 1 or any(n not in (1, size) for n, size in axes):
            raise InvalidShape(
                f"weights of every pixel have shape {tuple(one.shape)}, expected (B, M, *S) for x "
                f"(B, *S) = {tuple(shape)}, each axis of S as there or 1"
            )
    if not of_pixels:
        schedule: WeightSchedule = weights
        if callable(weights):  # and each step is asked for once
            schedule = cast("Callable[[int], WeightsLike]", each.__getitem__)
        return [rule_table(rule, weights=schedule, **options)] * len(steps)
    made = {id(one): rule_table(rule, weights=one, **options) for one in each}
    return [made[id(one)] for one in each]


def _levels(
    etas: Sequence[float] | Tensor | None, levels: NoiseLevels | None, count: int
) -> Levels:
    """Return the levels of M denoisers."""
    if (etas is None) == (levels is None):
        raise ValueError("give etas or levels, one of the two: a level for each denoiser")
    name, given = ("levels", levels) if etas is None else ("etas", etas)
    read = read_levels(given)  # type: ignore[arg-type]
    if (shape := tuple(read.values.shape)) != (count,):
        raise InvalidShape(f"{name} have shape {shape}, expected (M,) = ({count},)")
    return read


def _denoised(
    model: KDenoiser, m: int, x: Tensor, sigma: Tensor, extra_args: Mapping[str, Any]
) -> Tensor:
    output = model(x, sigma, **extra_args)
    if output.shape != x.shape:
        raise InvalidShape(
            f"models[{m}] returned shape {tuple(output.shape)}, expected that of x, "
            f"{tuple(x.shape)}"
        )
    return output.to(x.dtype)[None]  # K = 1: guidance is the denoiser's own

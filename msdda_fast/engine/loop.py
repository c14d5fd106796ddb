# SPDX-License-Identifier: Apache-2.0
"""The denoising loop, and Algorithm 1 over any denoisers that share a latent space.

Every sampler uses `run`, which does the steps of a `Generation`: an `EagerGeneration` calls its
networks and then the fused step, a captured generation replays a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from msdda_fast.engine.noise import NoiseSource, noise_source
from msdda_fast.engine.step import Outputs, by_objective
from msdda_fast.errors import BackendUnavailable, InvalidShape, NotFinite
from msdda_fast.kernels import registry
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.schedulers import levels_of, scheduler_rule
from msdda_fast.steps.table import rule_table
from msdda_fast.tracing import is_watched

if TYPE_CHECKING:
    from msdda_fast.levels import NoiseLevels
    from msdda_fast.types import (
        Backend,
        Denoiser,
        Fusion,
        GeneratorLike,
        Scheduler,
        SeedsLike,
        WeightSchedule,
        ZeroVariancePolicy,
    )

__all__ = ["EagerGeneration", "Generation", "Watch", "denoise", "run"]


class Generation(Protocol):
    """One request during sampling."""

    @property
    def x(self) -> Tensor:
        """The state, (B, *S) in latent units: x_t before a step and x_{t-1} after it."""

    def step(self, k: int) -> None:
        """Do step k = 0, 1, ... in sampling order; do each step once."""


#: Called after step k; whether to go on.
Watch: TypeAlias = Callable[[int], bool]


def run(generation: Generation, num_steps: int, watch: Watch | None = None) -> Tensor:
    """Do the steps of a generation in order until `watch` returns False; return the last state.

    Raises:
        NotFinite: The last state has NaN or infinity: a network, or what it was given, is broken.
    """
    for k in range(num_steps):
        generation.step(k)
        if watch is not None and not watch(k):
            break
    x = generation.x
    if not is_watched(x):
        _check_finite(x)
    return x


def _check_finite(x: Tensor) -> None:
    """One sync, when all steps are done: whoever asked for `x` waits for it anyway."""
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        bad = (~finite.flatten(1).all(1)).nonzero().flatten().tolist()
        raise NotFinite(
            f"sampling ended in NaN or infinity in {len(bad)} of {len(x)} samples (first: number "
            f"{bad[0]}); look for broken weights, values beyond the networks' dtype, or a "
            "guidance_scale that is far too large"
        )


class EagerGeneration:
    """Steps of Algorithm 1: each calls the networks and does a fused step on their predictions.

    Args:
        predict: Evaluates the active objectives: `f(x, k)` with x (B, *S) gives M outputs
            (K, B, *S), None for an objective without influence at step k.
        x_T: (B, *S), latent units, in the state dtype.
        table: Coefficients of T steps, on the device and in the dtype of the state.
        noise: Source of z.
        backend: Backend of the fused step: "auto", or one by name.
    """

    def __init__(
        self,
        predict: Callable[[Tensor, int], Outputs],
        x_T: Tensor,
        table: CoefficientTable,
        noise: NoiseSource,
        backend: Backend = "auto",
    ) -> None:
        self._predict, self._table, self._backend = predict, table, backend
        self._noise = noise.drawn_for(table)
        self._x = x_T

    @property
    def x(self) -> Tensor:
        """The state, (B, *S) in latent units."""
        return self._x

    def replace_x(self, x: Tensor) -> None:
        """Continue from another state (B, *S), between two steps."""
        self._x = x

    def replace_table(self, table: CoefficientTable) -> None:
        """Continue with other coefficients of the same T steps."""
        self._table = table

    def step(self, k: int) -> None:
        """Do step k: predict, fuse, add noise."""
        x = self._x
        outputs = by_objective(self._predict(x, k))
        present = [output for output in outputs if output is not None]
        noise = self._noise.step(k, like=present[0][0])
        dtypes = {output.dtype for output in present}
        if len(dtypes) > 1 or torch.promote_types(present[0].dtype, x.dtype) != x.dtype:
            outputs = [output if output is None else output.to(x.dtype) for output in outputs]
        self._x = fused_ddim_step(x, outputs, self._table[k], backend=self._backend, **noise)


def denoise(
    denoisers: Sequence[Denoiser],
    x_T: Tensor,
    *,
    scheduler: Scheduler,
    num_steps: int | None = 50,
    weights: WeightSchedule = None,
    etas: Sequence[float] | Tensor | None = None,
    levels: NoiseLevels | None = None,
    noise: Tensor | None = None,
    seeds: SeedsLike | None = None,
    generator: GeneratorLike | None = None,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    fusion: Fusion | None = None,
    strength: float | Sequence[Any] | Tensor | None = None,
    base: Denoiser | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sample x_0 from the product of experts of M denoisers, step by step (Algorithm 1, Eq. 7).

    `p_w(x_prev | x_t) ~ prod_i p_i(x_prev | x_t)^{w_i}`, each p_i the scheduler's step of denoiser
    i at its own noise level. A denoiser is called as `denoisers[i](x_t, t)`, x_t (B, *S) in the
    state dtype (scaled, for Euler ancestral, as `scale_model_input` does) and t a 0-d tensor of the
    scheduler's timesteps, int64 or floating, both on the device of `x_T`. It returns the prediction
    (B, *S) of the scheduler's type, guided if it wants guidance. It is not called at steps where no
    sample gives it weight. Gradients flow with `backend="eager"` only; other backends run without.

    Args:
        denoisers: M callables; architectures may differ, noise schedule and latent space may not.
        x_T: (B, *S), standard normal, times the scheduler's `init_noise_sigma` where that is not 1
            (Euler ancestral). The state is float64 when `x_T` is, else float32. With B = 0 no
            denoiser is called, and x_0 is as empty.
        scheduler: A diffusers scheduler that has a rule, copied; see `coefficient_table`.
        num_steps: T, in [1, num_train_timesteps]; None: as the scheduler's timesteps are set.
        weights: Preferences: None (uniform), (M,), (B, M) or (T, B, M), rows on the simplex, or a
            callable from the step index k = 0..T-1 to any of the first three, or a mapping to them
            from ranges of timesteps, such as `{(500, 999): [1, 0], (0, 499): [0, 1]}`, both ends
            included. Or (B, M, *S): a preference of every pixel, sum 1 over M, each axis of S that
            of `x_T` or 1, and two of them or more.
        etas: (M,), DDIM's eta of each denoiser, in [0, 1], or the scheduler's own kind of level.
        levels: Instead of etas: the same, or noise of flow models, such as `[FlowSDE(0.7)] * M`;
            see `coefficient_table`.
        noise: z of every step, (T, B, *S).
        seeds: Instead of `noise`: one 64-bit seed per sample, for counter-based noise.
        generator: Instead of either: one `torch.Generator`, or one per sample, drawn once per step
            in the dtype of the predictions, as diffusers does. With none of the three: torch's
            default generator.
        zero_variance: What to do when a sample mixes levels of 0 with others: "error", "dominate"
            or "ratio"; see `steps.shares.fusion_shares`.
        rates: (M,) > 0, the rates of "ratio".
        extrapolate: Accept negative weights while the total precision stays positive.
        fusion: "posterior", or "eps": one step at the fused level on mixed predictions, which keeps
            the noise level where levels differ; see `coefficient_table`.
        strength: How strongly each denoiser acts, s >= 0: a number, (M,) or (B, M); 1 is Eq. 7, 0
            the base, 2 twice as far from it. Needs `base`.
        base: The denoiser that they were aligned from.
        backend: "auto", or one by name: "eager", "native" or "triton".

    Returns:
        x_0, (B, *S), latent units, in the state dtype.

    Raises:
        InvalidShape: `x_T`, `weights`, `etas`, `levels`, `noise`, `seeds`, `generator` or a
            prediction has a wrong shape; or there is no denoiser.
        InvalidWeights, InvalidSchedule, ZeroVariance: See `coefficient_table`.
        ValueError: More than one of `noise`, `seeds` and `generator`; strength without base.
        BackendUnavailable: The named backend cannot run here, or `x_T` requires grad and the
            backend is not "eager".
        NotFinite: x_0 has NaN or infinity.
    """
    count = len(denoisers)
    if count == 0 or x_T.ndim == 0 or not x_T.is_floating_point():
        raise InvalidShape(
            f"expected denoisers and a floating-point x_T (B, *S); got {count} denoisers and x_T "
            f"of {x_T.dtype} and shape {tuple(x_T.shape)}"
        )
    if (strength is None) != (base is None):
        raise ValueError("give strength and base together: the strength is the distance from it")
    read = levels_of(scheduler, etas, levels, count)
    differentiates = torch.is_grad_enabled() and backend == "eager"
    if x_T.requires_grad and torch.is_grad_enabled() and not differentiates:
        raise BackendUnavailable(
            f"x_T requires grad, and backend={backend!r} has no gradients; use backend='eager', or "
            f"x_T.detach()"
        )
    state_dtype = torch.float64 if x_T.dtype == torch.float64 else torch.float32
    table = rule_table(
        scheduler_rule(scheduler, num_steps, read.noise),
        levels=read.values,
        weights=weights,
        batch_size=len(x_T),
        zero_variance=zero_variance,
        rates=rates,
        extrapolate=extrapolate,
        fusion=fusion,
        strength=strength,
        device=x_T.device,
        dtype=state_dtype,
    )
    source = noise_source(
        x_T.shape, len(table), x_T.device, noise=noise, seeds=seeds, generator=generator
    )
    registry.resolve("fused_step", backend, x_T.device.type)  # a missing backend fails before work
    if len(x_T) == 0:
        return x_T.to(state_dtype, copy=True)
    active = table.influence.tolist()  # [T][M]
    networks = [*denoisers] if base is None else [*denoisers, base]

    def predict(x: Tensor, k: int) -> list[Tensor | None]:
        x = x if table.input_scale is None else x * table.input_scale[k]
        return [
            _predict(denoiser, m, x, table.timesteps[k]) if is_active else None
            for m, (denoiser, is_active) in enumerate(zip(networks, active[k], strict=True))
        ]

    with torch.set_grad_enabled(differentiates):
        return run(
            EagerGeneration(predict, x_T.to(state_dtype), table, source, backend), len(table)
        )


def _predict(denoiser: Denoiser, m: int, x_t: Tensor, t: Tensor) -> Tensor:
    output = denoiser(x_t, t)
    if output.shape != x_t.shape:
        raise InvalidShape(
            f"denoisers[{m}] returned shape {tuple(output.shape)}, expected that of x_t, "
            f"{tuple(x_t.shape)}"
        )
    return output[None]  # K = 1: no unconditional half

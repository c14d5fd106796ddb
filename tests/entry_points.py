# SPDX-License-Identifier: Apache-2.0
"""The four ways to sample from fused denoisers, behind one signature: one test drives all."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from msdda_fast import coefficient_table, denoise, fast_fuse_step, fused_ddim_step
from msdda_fast.reference import algorithm_1, ddim_posterior
from tests.gaussian_world import Chain, grid

Denoiser = Callable[[Tensor, Tensor], Tensor]


def _posteriors(denoisers: Sequence[Denoiser], etas: Sequence[float], scheduler: DDIMScheduler, T):
    steps = grid(scheduler, T)

    def posterior(denoiser: Denoiser, eta: float):
        def at(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
            t, a, b = steps[k]
            return ddim_posterior(x, denoiser(x, torch.tensor(t)), a, b, eta)

        return at

    return [posterior(denoiser, eta) for denoiser, eta in zip(denoisers, etas, strict=True)]


def _objective_first(weights: Tensor) -> Tensor:
    return weights.movedim(-1, 0)


def reference(denoisers, etas, weights, x_T, noise, scheduler) -> Tensor:
    posteriors = _posteriors(denoisers, etas, scheduler, len(noise))
    return algorithm_1(posteriors, _objective_first(weights), x_T, noise)


def by_fast_fuse_step(denoisers, etas, weights, x_T, noise, scheduler, **policy) -> Tensor:
    x = x_T
    posteriors = _posteriors(denoisers, etas, scheduler, len(noise))
    for k, z in enumerate(noise):
        means, variances = zip(*(posterior(x, k) for posterior in posteriors), strict=True)
        x = fast_fuse_step(
            torch.stack(means),
            torch.stack(variances),
            _objective_first(weights),
            noise=z,
            **policy,
        )
    return x


def by_fused_ddim_step(denoisers, etas, weights, x_T, noise, scheduler, **policy) -> Tensor:
    table = coefficient_table(
        scheduler, len(noise), etas=etas, weights=weights, dtype=x_T.dtype, **policy
    )
    x = x_T
    for k, z in enumerate(noise):
        outputs = torch.stack([denoiser(x, table.timesteps[k]) for denoiser in denoisers])
        x = fused_ddim_step(x, outputs[:, None], table[k], noise=z)
    return x


def by_denoise(denoisers, etas, weights, x_T, noise, scheduler, **policy) -> Tensor:
    return denoise(
        denoisers,
        x_T,
        scheduler=scheduler,
        num_steps=len(noise),
        weights=weights,
        etas=etas,
        noise=noise,
        **policy,
    )


#: name -> sample(denoisers, etas, weights (M,) or (B, M), x_T, noise (T, B, *S), scheduler) -> x_0
ENTRY_POINTS = {
    "reference": reference,
    "fast_fuse_step": by_fast_fuse_step,
    "fused_ddim_step": by_fused_ddim_step,
    "denoise": by_denoise,
}


def chain_posterior(chain: Chain):
    """An affine chain as a p_i(x_prev | x_t) of `reference.algorithm_1`."""

    def at(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        step = chain[k]
        return step.scale * x + step.shift, torch.tensor(step.var, dtype=x.dtype)

    return at


def reference_chains(chains: Sequence[Chain], weights: Tensor, x_T: Tensor, noise: Tensor):
    return algorithm_1([chain_posterior(chain) for chain in chains], weights, x_T, noise)


def fast_fuse_chains(chains: Sequence[Chain], weights: Tensor, x_T: Tensor, noise: Tensor):
    x = x_T
    for k, z in enumerate(noise):
        moments = [chain_posterior(chain)(x, k) for chain in chains]
        x = fast_fuse_step(
            torch.stack([mean for mean, _ in moments]),
            torch.stack([var for _, var in moments]),
            weights,
            noise=z,
        )
    return x


#: The entry points that take any per-step variance: sample(chains, weights (M,), x_T, noise) -> x_0
CHAIN_ENTRY_POINTS = {"reference": reference_chains, "fast_fuse_step": fast_fuse_chains}

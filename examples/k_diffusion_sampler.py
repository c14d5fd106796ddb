# SPDX-License-Identifier: Apache-2.0
"""Euler ancestral over two denoisers in k-diffusion's conventions: (x, sigma) -> denoised x_0."""

import torch

from msdda_fast.integrations.k_diffusion import sample_msdda


def denoiser(mean):
    """The ideal denoiser of N(mean, 1/4); put a k-diffusion model in its place."""

    def denoised(x, sigma):
        noise_var = sigma.reshape(-1, 1, 1, 1) ** 2
        return (0.25 * x + noise_var * mean) / (0.25 + noise_var)

    return denoised


sigmas = torch.cat([torch.logspace(1.16, -1.5, 25), torch.zeros(1)])
x = torch.randn(2, 4, 64, 64) * sigmas[0]
models = [denoiser(1.0), denoiser(-1.0)]
x_0 = sample_msdda(models, x, sigmas, weights=[0.3, 0.7], etas=[1.0, 0.8], seeds=[1, 2])
print(f"mean {x_0.mean():.3f}, standard deviation {x_0.std():.3f}")

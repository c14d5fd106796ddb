# SPDX-License-Identifier: Apache-2.0
"""A DDIM loop of one's own over two models, in which `fast_fuse_step` draws x_prev.

The models here are ideal denoisers of N(1, 1/4) and N(-1, 1/4), so the result can be checked: it is
close to N(0.25 - 0.75, 1/4). An objective of low eta counts for more than its weight of 0.7 says;
`effective_weights` says by how much.
"""

import torch

import msdda_fast as mf

ETAS, WEIGHTS, STEPS = (1.0, 0.8), [0.3, 0.7], 200
alpha_bar = torch.cat([torch.cos(torch.linspace(1.54, 0.02, STEPS)) ** 2, torch.ones(1)])


def predicted_noise(x, a, mean):
    """What a network would return at alpha-bar `a`."""
    return (1 - a).sqrt() * (x - a.sqrt() * mean) / (1 - 0.75 * a)


def posterior(x, noise, a, a_prev, eta):
    """Mean and variance of the DDIM step from `a` to `a_prev`."""
    variance = eta**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    x_0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
    return a_prev.sqrt() * x_0 + (1 - a_prev - variance).sqrt() * noise, variance


seeds = list(range(1000))
x = mf.counter_noise(seeds, (len(seeds), 4), stream=0)
for k in range(STEPS):
    a, a_prev = alpha_bar[k], alpha_bar[k + 1]
    moments = [
        posterior(x, predicted_noise(x, a, mean), a, a_prev, eta)
        for mean, eta in zip((1.0, -1.0), ETAS, strict=True)
    ]
    means, variances = zip(*moments, strict=True)
    if a_prev == 1:  # the last step adds no noise: in its limit, shares by w_i / eta_i^2
        options = {"zero_variance": "ratio", "rates": ETAS}
    else:
        options = {}
    x = mf.fast_fuse_step(means, torch.stack(variances), WEIGHTS, seeds=seeds, step=k, **options)

first, second = mf.effective_weights(WEIGHTS, ETAS)[0].tolist()
print(f"mean {x.mean():.3f}, expected {first - second:.3f}; standard deviation {x.std():.3f}")

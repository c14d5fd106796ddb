# SPDX-License-Identifier: Apache-2.0
"""The value network of DPOK: expected reward from a latent, the prompt and the step index."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class _StepLinear(nn.Module):
    """y = g_k * (W x + b) with one learned vector g_k per step k."""

    def __init__(self, inputs: int, outputs: int, num_steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.gain = nn.Embedding(num_steps, outputs)
        nn.init.uniform_(self.gain.weight)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        out: Tensor = self.gain(step) * self.linear(x)
        return out


class ValueNetwork(nn.Module):
    """V(x_t, prompt, k): three layers of `width` with a gain per step, then one number.

    The published `ValueMulti`: softplus between layers, the step *index* k in [0, T) and not the
    timestep. The prompt enters as the mean of its token embeddings.

    Args:
        latent_dims: d, the size of a flattened latent.
        text_dims: D, the size of a token embedding.
        num_steps: T.
        width: Width of the hidden layers.
        seed: Seed of the initial weights; the global random state is not changed.
    """

    def __init__(
        self, latent_dims: int, text_dims: int, num_steps: int, width: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = _StepLinear(latent_dims + text_dims, width, num_steps)
            self.second = _StepLinear(width, width, num_steps)
            self.third = _StepLinear(width, width, num_steps)
            self.last = nn.Linear(width, 1)

    def forward(self, x_t: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """Return the values, (n,), in the reward's units.

        Args:
            x_t: (n, *S) float32.
            text: (n, D) float32.
            step: (n,) int64, k.
        """
        hidden = torch.cat([x_t.flatten(1), text], dim=1)
        for layer in (self.first, self.second, self.third):
            hidden = functional.softplus(layer(hidden, step))
        value: Tensor = self.last(hidden)
        return value.squeeze(1)

# SPDX-License-Identifier: Apache-2.0
"""What search methods are tested with: order statistics, Monte-Carlo error, rewards of images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PROMPTS, SEEDS = ["a red dog", "a blue cat"], [3, 4]
WEIGHTS = {"warm": 0.3, "cool": 0.7}


@dataclass(frozen=True)
class Redness:
    """How much of the images is red; with `sign` -1, how little. Smooth, and never flat."""

    name: str
    sign: float = 1.0
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts) -> Tensor:
        red, green, _ = images.unbind(1)
        return (self.sign * red - green.square()).mean((1, 2))


REWARDS = {"warm": Redness("warm"), "cool": Redness("cool", -1.0)}


class Indifferent:
    """Likes all images equally well."""

    name, differentiable = "indifferent", True

    def __call__(self, images: Tensor, prompts) -> Tensor:
        return 0 * images.mean((1, 2, 3))


INDIFFERENT = dict.fromkeys(WEIGHTS, Indifferent())


def largest_of(n: int) -> float:
    """E max of n standard normals: the density of the maximum is n phi Phi^(n - 1)."""
    z = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    phi = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return float((z * n * phi * torch.special.ndtr(z) ** (n - 1)).sum() * (z[1] - z[0]))


def has_mean(draws: Tensor, mean: float) -> bool:
    """Whether independent draws agree with `mean`: within 4.5 standard errors."""
    return bool(abs(draws.mean() - mean) < 4.5 * draws.std() / math.sqrt(len(draws)))

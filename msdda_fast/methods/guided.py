# SPDX-License-Identifier: Apache-2.0
r"""What methods that follow the gradients of rewards have in common.

The target is `p(x_0) exp(r_w(x_0) / alpha)`: the smaller alpha, the stronger the rewards.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Method

__all__ = ["GuidedMethod", "Purposes", "log_mean_exp", "renoised", "require"]


class GuidedMethod(Method):
    """A method that needs gradients of the rewards."""

    needs_rewards: ClassVar[bool] = True

    @property
    def needs_gradients(self) -> bool:
        """Always True: sampling differentiates the rewards."""
        return True


class Purposes:
    """The purposes of the random draws in one pass over a step; the last pass is the one kept.

    Args:
        passes_left: Passes after this one. With 0, `step` is the noise of every sampler.
    """

    def __init__(self, passes_left: int) -> None:
        self.step, self.samples, self.renoise = range(3 * passes_left, 3 * passes_left + 3)


def require(holds: bool, rule: str, value: object) -> None:
    """Raise ValueError with the rule and the value unless a setting follows its rule."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}")


def log_mean_exp(values: Tensor, particles: int) -> Tensor:
    """Return log (1/N) sum_n exp(values_n), (B,), of values (N B,), particle-major."""
    return values.view(particles, -1).logsumexp(0) - math.log(particles)


def renoised(step: DDIMStep, x_prev: Tensor, z: Tensor) -> Tensor:
    """Return latents noised back to the step's start: sqrt(a/p) x_prev + sqrt(1 - a/p) z."""
    kept = step.alpha / step.alpha_prev
    return math.sqrt(kept) * x_prev + math.sqrt(1 - kept) * z

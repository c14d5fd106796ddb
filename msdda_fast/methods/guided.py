# SPDX-License-Identifier: Apache-2.0
r"""What methods that follow the gradient of rewards have in common.

The target is `p(x_0) exp(r_w(x_0) / alpha)`: the smaller alpha, the more a reward weighs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.methods.method import Drawn, Method
from msdda_fast.rewards import Reward

if TYPE_CHECKING:
    from msdda_fast.pipeline import MSDDAPipeline

__all__ = ["GuidedMethod", "Purposes", "log_mean_exp", "renoised", "repeated", "require"]


class GuidedMethod(Method):
    """A method that needs gradients of the rewards."""

    needs_rewards: ClassVar[bool] = True

    def __call__(
        self,
        pipe: MSDDAPipeline,
        prompts: Sequence[str],
        weights: Mapping[str, float],
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        rewards: Mapping[str, Reward] | None = None,
    ) -> Drawn:
        """See `Method.__call__`.

        Raises:
            ValueError: A reward whose weight is not 0 has no gradient; otherwise as there.
        """
        for name, reward in (rewards or {}).items():
            if weights.get(name, 0.0) != 0 and not reward.differentiable:
                raise ValueError(
                    f"{self.name} follows the gradients of rewards, and reward {name!r} has none: "
                    f"its `differentiable` is False"
                )
        return super().__call__(
            pipe,
            prompts,
            weights,
            seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            rewards=rewards,
        )


class Purposes:
    """The draws of one pass over a step, of which the last pass is the one that counts.

    Args:
        passes_left: After this one. With 0, `step` is the noise of every sampler.
    """

    def __init__(self, passes_left: int) -> None:
        self.step, self.samples, self.renoise = range(3 * passes_left, 3 * passes_left + 3)


def require(holds: bool, rule: str, value: object) -> None:
    """Raise ValueError unless a setting keeps to its rule."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}")


def repeated(x: Tensor, copies: int) -> Tensor:
    """(N B, *S) of x (B, *S), copy-major."""
    return x.repeat(copies, *[1] * (x.ndim - 1))


def log_mean_exp(values: Tensor, copies: int) -> Tensor:
    """log (1/N) sum_n exp(values_n), (B,), of values (N B,), copy-major."""
    return values.view(copies, -1).logsumexp(0) - math.log(copies)


def renoised(step: DDIMStep, x_prev: Tensor, z: Tensor) -> Tensor:
    """Latents at the level of the step's start: sqrt(a/p) x_prev + sqrt(1 - a/p) z."""
    kept = step.alpha / step.alpha_prev
    return math.sqrt(kept) * x_prev + math.sqrt(1 - kept) * z

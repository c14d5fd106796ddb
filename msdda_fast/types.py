# SPDX-License-Identifier: Apache-2.0
"""Types used across the package. Axis letters: `b` sample, `m` objective, `t` step, `S` latent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Backend",
    "Denoiser",
    "Fusion",
    "GeneratorLike",
    "Scheduler",
    "SeedsLike",
    "WeightSchedule",
    "WeightsLike",
    "ZeroVariancePolicy",
]

Backend: TypeAlias = Literal["auto", "eager", "native", "triton"]

#: "posterior": Eq. 7. "eps": the objectives' noise predictions are mixed, and one step taken.
#: Entry points also take None: "eps" for CPS with unequal levels, else "posterior".
Fusion: TypeAlias = Literal["posterior", "eps"]

#: What to do where some fused variances are zero and others are not: `steps.shares.fusion_shares`.
ZeroVariancePolicy: TypeAlias = Literal["error", "dominate", "ratio"]

#: Preferences: None (uniform), names to numbers, one mapping per sample, (M,) or (B, M) numbers.
WeightsLike: TypeAlias = (
    Tensor | Mapping[str, float] | Sequence[Mapping[str, float]] | Sequence[Any] | None
)

#: `WeightsLike`, or a function from the step k = 0, 1, ... (in sampling order) to `WeightsLike`, or
#: a mapping from ranges of timesteps, (first, last) or "first-last", to it: see `weight_ranges`.
WeightSchedule: TypeAlias = (
    WeightsLike
    | Callable[[int], WeightsLike]
    | Mapping[tuple[float, float], WeightsLike]
    | Mapping[str, WeightsLike]
)

#: One 64-bit seed per sample: B integers in a sequence or numpy array, or an integer tensor (B,).
SeedsLike: TypeAlias = Sequence[int] | Tensor

#: One generator for the batch, or one per sample.
GeneratorLike: TypeAlias = torch.Generator | Sequence[torch.Generator]


class Scheduler(Protocol):
    """The part of a diffusers scheduler that this package reads."""

    alphas_cumprod: Tensor  # (num_train_timesteps,) alpha-bar
    timesteps: Tensor  # (T,) after set_timesteps

    @property
    def config(self) -> Any: ...  # noqa: ANN401 - diffusers' FrozenDict, read by attribute

    def set_timesteps(self, num_inference_steps: int) -> None: ...


class Denoiser(Protocol):
    """A network seen as a function of the latent x_t (B, *S) and the timestep t (0-d)."""

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...

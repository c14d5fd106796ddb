# SPDX-License-Identifier: Apache-2.0
"""What a method may do to draw B images: the seam between samplers and networks.

There are two. A `FusedModel` draws whole images from fused models; that is all that systems without
rewards need, and any pipeline with objectives is one (`StockModel`). A `LatentModel` can be taken
step by step, too: `PipelineModel` is one with Stable Diffusion's captured pipeline, and the tests
have Gaussians whose answers are known. A method sees nothing else, so all run the same code.

Latents are (n, *S) with n = N B, particle-major: N particles (candidates, perturbations) of each of
the B samples, `x.view(N, B, *S)`. Row r belongs to sample `r % B` unless `rows` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from msdda_fast.levels import TimestepRange
from msdda_fast.lora.soup import Merge
from msdda_fast.methods.ddim import DDIMStep
from msdda_fast.steps.ddim import DDIMGrid
from msdda_fast.steps.shares import effective_weights, fusion_shares
from msdda_fast.types import Fusion

__all__ = [
    "BASE",
    "Cost",
    "DDIMLevels",
    "FusedModel",
    "Fusion",
    "LatentModel",
    "Level",
    "preferred",
]

#: The name of the base model among the models.
BASE = "base"
#: A noise level: DDIM's eta, or what another scheduler has in its place (`StockModel`).
Level: TypeAlias = Any


@dataclass(slots=True)
class Cost:
    """The cost of B images together, counted where it arises.

    Attributes:
        unet_forwards: Latents through a UNet; with guidance each counts twice.
        unet_backwards: Latents through the backward pass of a UNet.
        decodes: Latents through the decoder of the VAE.
        reward_calls: Images scored, once for each reward.
    """

    unet_forwards: int = 0
    unet_backwards: int = 0
    decodes: int = 0
    reward_calls: int = 0


class FusedModel(Protocol):
    """A base model and models aligned from it, for B prompts with one seed each.

    Attributes:
        preference: Weights w on the simplex, by the name of a model and of its reward.
        etas: The noise levels of the aligned models by name.
        batch_size: B.
        cost: The cost so far.
    """

    @property
    def preference(self) -> Mapping[str, float]: ...
    @property
    def etas(self) -> Mapping[str, Level]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def cost(self) -> Cost: ...

    def level(self, eta: float | None) -> Level:
        """Return the level of a system whose networks share one.

        Args:
            eta: DDIM's; None, and wherever levels are of another kind: the noise of MSDDA at the
                preference.
        """

    def remapped(self) -> tuple[dict[str, float], Level]:
        """Return the weights and the level at which mixed predictions are MSDDA's.

        They are in the limit T -> infinity; see `effective_weights`.

        Raises:
            InvalidSchedule: No weights do that in all steps; see `StockModel`.
        """

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, Level],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        """Return x_0, (B, *S), from the fused reverse steps of several models with equal noise.

        Args:
            weights: By model name, including `BASE` if wanted; the sum is 1.
            etas: Noise levels, by the same names.
            fusion: How the steps are combined; see `Fusion`.
            extrapolate: Accept negative weights while the fused precision stays positive.
        """

    def switched(self, names: Sequence[str], choose: Callable[[int], Tensor], eta: Level) -> Tensor:
        """Return x_0, (B, *S), from steps of one model each, which samples choose for themselves.

        Args:
            names: Names of models.
            choose: From the step k to the index of a name for each sample, (B,) int64.
            eta: The level of all.
        """

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        """Return one random number in (0, 1) per sample for a choice at step k, (B,).

        Each purpose, a small integer of the method's choice, has its own draws.
        """

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) in [0, 1] of what `generate` or `switched` returned."""

    def soup(
        self,
        weights: Mapping[str, float],
        merge: Merge = "product",
        rotation: int | None = None,
    ) -> str:
        """Make the model of averaged weights `theta = sum_i w_i theta_i`, and return its name.

        Its guidance scale is the average of the models' scales, and it acts in their timesteps. It
        is removed with this object. If only one weight is not 0, it is that model itself.

        Args:
            weights: By model name, including `BASE` if wanted; the sum is 1.
            merge: How adapters are merged; see `msdda_fast.lora.soup`. Full networks are averaged.
            rotation: Seed of random rotations of the factors, for "factor".

        Raises:
            AdapterMismatch: The models cannot be averaged; the message says why.
            ValueError: `merge` is unknown.
        """

    def load(self, path: str | Path, timesteps: TimestepRange | None = None) -> str:
        """Make a model of the base and the adapter at `path`, and return its name.

        It has the guidance scale of the base, and is removed with this object.

        Args:
            path: A file, folder or hub id.
            timesteps: The timesteps in which it acts, the base elsewhere; None: all.

        Raises:
            FileNotFoundError: `path` does not exist.
            AdapterMismatch: The adapter was made for another base.
            ValueError: The file is not safetensors, or holds something other than LoRA.
        """


class LatentModel(FusedModel, Protocol):
    """A `FusedModel` on DDIM's grid that can be taken step by step, with rewards.

    Attributes:
        grid: The T steps.
        etas: The etas of the aligned models by name, in [0, 1].
    """

    @property
    def grid(self) -> DDIMGrid: ...
    @property
    def etas(self) -> Mapping[str, float]: ...

    def initial(self) -> Tensor:
        """Return x_T, (B, *S) float32 or wider, a function of each sample's seed alone."""

    def noise(self, k: int, particles: int = 1, *, purpose: int = 0) -> Tensor:
        """Return z of step k for N particles, (N B, *S).

        Particle 0 of purpose 0 has the z that every sampler uses.
        """

    def acting(self, name: str, k: int) -> str:
        """Return whose network runs at step k: the base's outside of the model's timesteps."""

    def eps(self, x: Tensor, k: int, name: str = BASE, rows: Tensor | None = None) -> Tensor:
        """Return the noise prediction of one model at step k, with its guidance, (n, *S).

        It has a gradient if `x` has one and gradients are enabled.

        Args:
            x: (n, *S) at the noise level before step k; there is no step after the last one.
            k: Step, 0 to T - 1.
            name: `BASE`, or an aligned model.
            rows: (n,) int64, the sample that each row belongs to.
        """

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the images (n, 3, H, W) in [0, 1] of latents (n, *S); gradients as in `eps`."""

    def rewards(self, images: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the rewards whose preference is not 0, by name, (n,) each.

        Images without a gradient are rounded to 8 bits first, as if they had been saved.
        """

    def redraw(self, number: int) -> AbstractContextManager[None]:
        """Within the context, all randomness is that of another draw; number 0 is the usual one."""


class DDIMLevels:
    """What follows for every `LatentModel`: levels are etas, and a step is DDIM's."""

    def level(self: LatentModel, eta: float | None) -> float:
        """Return eta, or eta_w of the models in the preference at their own etas."""
        if eta is not None:
            return eta
        w, etas = self.preference, [self.etas[name] for name in self.preference]
        weights = torch.tensor(list(w.values()), dtype=torch.float64)
        _, eta_w = fusion_shares(weights, torch.tensor(etas, dtype=torch.float64))
        return float(eta_w)

    def remapped(self: LatentModel) -> tuple[dict[str, float], float]:
        """Return `effective_weights` of the preference, and eta_w."""
        w = self.preference
        what, eta_w = effective_weights(list(w.values()), [self.etas[name] for name in w])
        return dict(zip(w, what.tolist(), strict=True)), float(eta_w)

    def switched(
        self: LatentModel, names: Sequence[str], choose: Callable[[int], Tensor], eta: float
    ) -> Tensor:
        """Return x_0 from steps of one model each; only the chosen networks run."""
        x = self.initial()
        for k in range(len(self.grid.timesteps)):
            chosen = choose(k)
            eps = torch.empty_like(x)
            for i, name in enumerate(names):
                rows = (chosen == i).nonzero().flatten()
                if len(rows):
                    eps[rows] = self.eps(x[rows], k, name, rows)
            x = DDIMStep.of(self.grid, k, eta).prev(x, eps, self.noise(k))
        return x


def preferred(model: LatentModel, rewards: Mapping[str, Tensor]) -> Tensor:
    """Return r_w = sum_j w_j r_j, (n,)."""
    return torch.stack([model.preference[name] * value for name, value in rewards.items()]).sum(0)

# SPDX-License-Identifier: Apache-2.0
"""What a method may do to draw B images: the seam between samplers and networks.

`PipelineModel` implements it with a diffusers pipeline, the tests with Gaussians whose answers are
known. A method sees nothing else, so both run the same code.

Latents are (n, *S) with n = N B, particle-major: N particles (candidates, perturbations) of each of
the B samples, `x.view(N, B, *S)`. Row r belongs to sample `r % B` unless `rows` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from msdda_fast.levels import TimestepRange
from msdda_fast.lora.soup import Merge
from msdda_fast.steps.ddim import DDIMGrid
from msdda_fast.steps.shares import fusion_shares
from msdda_fast.types import Fusion

__all__ = ["BASE", "Cost", "Fusion", "LatentModel", "fused_eta", "preferred"]

#: The name of the base model among the models.
BASE = "base"


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


class LatentModel(Protocol):
    """A base model, models aligned from it, and rewards, for B prompts with one seed each.

    Attributes:
        grid: The T steps.
        preference: Weights w on the simplex, by the name of a model and of its reward.
        etas: The etas of the aligned models by name, in [0, 1].
        batch_size: B.
        cost: The cost so far.
    """

    @property
    def grid(self) -> DDIMGrid: ...
    @property
    def preference(self) -> Mapping[str, float]: ...
    @property
    def etas(self) -> Mapping[str, float]: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def cost(self) -> Cost: ...

    def initial(self) -> Tensor:
        """Return x_T, (B, *S) float32 or wider, a function of each sample's seed alone."""

    def noise(self, k: int, particles: int = 1, *, purpose: int = 0) -> Tensor:
        """Return z of step k for N particles, (N B, *S).

        Each purpose, a small integer of the method's choice, has its own draws. Particle 0 of
        purpose 0 has the z that every sampler uses.
        """

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        """Return one random number in (0, 1) per sample for a choice at step k, (B,)."""

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

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, float],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        """Return x_0, (B, *S), from the fused reverse steps of several models with equal noise.

        Args:
            weights: By model name, including `BASE` if wanted; the sum is 1.
            etas: In (0, 1], by the same names.
            fusion: How the steps are combined; see `Fusion`.
            extrapolate: Accept negative weights while the fused precision stays positive.
        """

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

    def redraw(self, number: int) -> AbstractContextManager[None]:
        """Within the context, all randomness is that of another draw; number 0 is the usual one."""

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


def preferred(model: LatentModel, rewards: Mapping[str, Tensor]) -> Tensor:
    """Return r_w = sum_j w_j r_j, (n,)."""
    return torch.stack([model.preference[name] * value for name, value in rewards.items()]).sum(0)


def fused_eta(model: LatentModel) -> float:
    """Return eta_w of the models in the preference, at their own etas: the noise of MSDDA."""
    w, etas = model.preference, [model.etas[name] for name in model.preference]
    weights = torch.tensor(list(w.values()), dtype=torch.float64)
    _, eta_w = fusion_shares(weights, torch.tensor(etas, dtype=torch.float64))
    return float(eta_w)

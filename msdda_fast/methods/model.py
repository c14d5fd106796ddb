# SPDX-License-Identifier: Apache-2.0
"""What a method may do to draw B images: the seam between samplers and networks.

`PipelineModel` does it with a diffusers pipeline; the tests do it with Gaussians whose answers are
known. A method sees nothing else, so both run the same lines.

Latents are (n, *S) with n = N B, copy-major: N copies (particles, candidates) of the B samples,
`x.view(N, B, *S)`. Row r belongs to sample `r % B` unless `rows` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from msdda_fast.lora.soup import Merge
from msdda_fast.steps.ddim import DDIMGrid
from msdda_fast.steps.shares import fusion_shares
from msdda_fast.types import Fusion

__all__ = ["BASE", "Cost", "Fusion", "LatentModel", "fused_eta", "preferred"]

#: The name of the base model among the models.
BASE = "base"


@dataclass(slots=True)
class Cost:
    """What B images have cost together, counted where it happens.

    Attributes:
        unet_forwards: Latents through a UNet; guidance makes two of each.
        unet_backwards: Latents through the backward of a UNet.
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
        preference: Weights w by name of a model and of its reward, on the simplex.
        etas: Of the aligned models by name, in [0, 1].
        batch_size: B.
        cost: Counts up.
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
        """x_T, (B, *S) float32 or wider: a function of each sample's seed alone."""

    def noise(self, k: int, copies: int = 1, *, purpose: int = 0) -> Tensor:
        """z of step k, (N B, *S), for N copies; copy 0 of purpose 0 is every sampler's own z.

        Each purpose, a small integer of the method's choice, has draws of its own.
        """

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        """One number in (0, 1) per sample for a choice at step k, (B,)."""

    def eps(self, x: Tensor, k: int, name: str = BASE, rows: Tensor | None = None) -> Tensor:
        """Noise prediction of one model at step k, guided as it is sampled, (n, *S).

        With a gradient where `x` has one and gradients are on.

        Args:
            x: (n, *S) at the noise level of step k; the level after the last step has none.
            k: Step, 0 to T - 1.
            name: `BASE`, or an aligned model.
            rows: (n,) int64, the sample that each row belongs to.
        """

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] of latents (n, *S); with a gradient as `eps`."""

    def rewards(self, images: Tensor, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Rewards whose preference is not 0, by name, (n,) each.

        Images without a gradient are scored as they would be saved, in 8 bits.
        """

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, float],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        """x_0, (B, *S), from the fused reverse steps of several models with equal noise.

        Args:
            weights: By name of a model, `BASE` among them if wanted; sum 1.
            etas: In (0, 1], by the same names.
            fusion: See `Fusion`.
            extrapolate: Accept negative weights while the fused precision stays positive.
        """

    def soup(self, weights: Mapping[str, float], merge: Merge = "product") -> str:
        """Make the model of averaged weights `theta = sum_i w_i theta_i`, and return its name.

        It is guided by the average of the models' guidance scales, and is gone with this object.
        With one weight that is not 0 it is that model itself.

        Args:
            weights: By name of a model, `BASE` among them if wanted; sum 1.
            merge: Of adapters; see `msdda_fast.lora.soup`. Networks of their own are averaged.

        Raises:
            AdapterMismatch: Models that cannot be averaged; says why.
            ValueError: Another merge than those.
        """

    def load(self, path: str | Path) -> str:
        """Make a model of the base and the adapter at `path`, and return its name.

        It is guided as the base is, and is gone with this object.

        Raises:
            FileNotFoundError: Nothing is there.
            AdapterMismatch: The adapter was made for another base.
            ValueError: The file is not safetensors, or holds something other than LoRA.
        """


def preferred(model: LatentModel, rewards: Mapping[str, Tensor]) -> Tensor:
    """r_w = sum_j w_j r_j, (n,)."""
    return torch.stack([model.preference[name] * value for name, value in rewards.items()]).sum(0)


def fused_eta(model: LatentModel) -> float:
    """eta_w of the preferred models at their own etas: the noise that MSDDA has."""
    w, etas = model.preference, [model.etas[name] for name in model.preference]
    weights = torch.tensor(list(w.values()), dtype=torch.float64)
    _, eta_w = fusion_shares(weights, torch.tensor(etas, dtype=torch.float64))
    return float(eta_w)

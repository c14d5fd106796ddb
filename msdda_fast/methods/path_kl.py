# SPDX-License-Identifier: Apache-2.0
r"""How far a sampler strays from the base model: the KL divergence of its path, in nats.

A fused step and the base's, from the same x_t and with the same sigma_w, differ in their means:

    KL_t = |sum_m B_m (out_m - out_base)|^2 / (2 sigma_w^2),

for network outputs that a step takes with coefficients B_m. On the sampler's own path the steps add
up to KL(sampler || base) over paths (chain rule), which bounds that of the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, UnsupportedNetwork
from msdda_fast.methods.db_kla import DBKLA
from msdda_fast.methods.db_mpa import DBMPA
from msdda_fast.methods.deradiff import DeRaDiff
from msdda_fast.methods.method import Method, Pipeline, needs_captured
from msdda_fast.methods.model import BASE, Fusion, Level
from msdda_fast.methods.morl_oracle import MORLOracle
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.pipeline_model import PipelineModel
from msdda_fast.methods.rewarded_soup import RewardedSoup
from msdda_fast.methods.sd import SD
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.steps.table import coefficient_table

__all__ = ["has_path_kl", "path_kl"]

_FUSED = (SD, MSDDA, RewardedSoup, DBMPA, MORLOracle, DBKLA, DeRaDiff)


def has_path_kl(method: Method) -> bool:
    """Return whether every step of a method is the Gaussian of fused models, and nothing else."""
    return isinstance(method, _FUSED)


@torch.no_grad()
def path_kl(
    method: Method,
    pipe: Pipeline,
    prompts: Sequence[str],
    weights: Mapping[str, float],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
) -> Tensor:
    """Return the KL of each image's path to the base's, in nats: (B,) float64, on the host.

    One path per image: an unbiased estimate of the divergence. Arguments as of `Method.__call__`;
    the paths are those of its images, up to rounding.

    Raises:
        UnsupportedNetwork: The pipeline is not Stable Diffusion's.
        ValueError: The method is none of those that `has_path_kl` knows.
        InvalidSchedule: x_0 is clipped, which leaves steps no Gaussians; otherwise as
            `Method.__call__`.
    """
    if isinstance(pipe, WithObjectives):
        raise UnsupportedNetwork(f"path KL {needs_captured(pipe)}")
    if not has_path_kl(method):
        raise ValueError(f"the steps of {method.name} are not fused Gaussians: it has no path KL")
    with _MeasuredModel(
        pipe,
        prompts,
        weights,
        seeds,
        num_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    ) as model:
        method.sample(model)
        return model.kl


class _MeasuredModel(PipelineModel):
    """A model that samples step by step, beside the base."""

    kl: Tensor

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, Level],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        """Return x_0 of `PipelineModel.generate`, and leave the KL of its path in `kl`."""
        steps = len(self.grid.timesteps)
        table = coefficient_table(
            self._pipe.scheduler,
            steps,
            etas=[etas[name] for name in weights],
            weights=list(weights.values()),
            fusion=fusion,
            extrapolate=extrapolate,
            dtype=torch.float64,
        )
        if table.clip_range is not None:
            raise InvalidSchedule("clip_sample makes the step non-Gaussian; set clip_sample=False")
        x = self.initial()
        rows = self._rows(x, None)
        self.kl = torch.zeros(self.batch_size, dtype=torch.float64)
        for k in range(steps):
            row, layout = table.rows[k, 0].to(x.device), table[k].layout
            acting = [self.acting(name, k) for name in weights]
            outputs = {name: self._predict(x, k, name, rows).double() for name in {*acting, BASE}}
            scales = row[layout.cond]
            terms = [s * outputs[name] for s, name in zip(scales, acting, strict=True)]
            mixed = torch.stack(terms).sum(0)
            if table.std[k, 0] > 0:
                shift = mixed - scales.sum() * outputs[BASE]
                kl = shift.flatten(1).square().sum(1) / (2 * float(table.std[k, 0]) ** 2)
                self.kl += kl.cpu()
            moved = row[layout.x_scale] * x + mixed + row[layout.noise_scale] * self.noise(k)
            x = moved.to(x.dtype)
        return x

# SPDX-License-Identifier: Apache-2.0
"""The coefficients of fused steps: what `schedule` builds and the kernels consume."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["CoefficientTable", "StepCoefficients"]


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """The coefficients of one step: all that a step kernel sees. A zero masks the input it scales.

    Linear layout, C = 2M + 2: `x_scale, uncond[M], cond[M], noise_scale`,

        x_prev = x_scale x + sum_m (uncond_m u_m + cond_m c_m) + noise_scale z.

    Clipped layout, C = 5M + 3, when `clip_range = r` is a number: the same, followed by
    `x0_x, x0_uncond[M], x0_cond[M], x0_scale[M]`, which add the clipped x_0 predictions,

        sum_m x0_scale_m clamp(x0_x x + x0_uncond_m u_m + x0_cond_m c_m, -r, r).

    Attributes:
        row: (B, C), no unit; B = 1 stands for every sample of the batch.
        num_objectives: M.
        clip_range: r in latent units, or None for the linear layout.
    """

    row: Tensor
    num_objectives: int
    clip_range: float | None


@dataclass(frozen=True, slots=True)
class CoefficientTable:
    """The coefficients of all steps, in sampling order; `table[k]` is step k.

    Attributes:
        rows: (T, B, C) in the compute dtype and on the compute device; see `StepCoefficients`.
        timesteps: (T,) int64, on the device of `rows`, decreasing.
        num_objectives: M.
        clip_range: x_0 predictions are clamped to [-clip_range, clip_range]; None: they are not.
        share: (T, B, M) float64 on the host, the fusion weights of means, or of predictions with
            `fusion="eps"`: sum 1 over M.
        std: (T, B) float64 on the host, sigma_w in latent units.
        needs_uncond: Whether some coefficient of an unconditional output is not zero.
    """

    rows: Tensor
    timesteps: Tensor
    num_objectives: int
    clip_range: float | None
    share: Tensor
    std: Tensor
    needs_uncond: bool

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, k: int) -> StepCoefficients:
        if not -len(self) <= k < len(self):
            raise IndexError(f"step {k} is outside the table of {len(self)} steps")
        return StepCoefficients(self.rows[k], self.num_objectives, self.clip_range)

    @property
    def active(self) -> list[bool]:
        """Whether each objective has influence on some sample at some step."""
        flags: list[bool] = (self.share != 0).flatten(0, 1).any(0).tolist()
        return flags

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CoefficientTable:
        """Return the table with `rows` and `timesteps` moved; the float64 diagnostics stay."""
        timesteps = self.timesteps.to(device=device)
        return replace(self, rows=self.rows.to(device=device, dtype=dtype), timesteps=timesteps)

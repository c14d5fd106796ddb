# SPDX-License-Identifier: Apache-2.0
"""The coefficients of fused steps, and which column holds which: `steps` builds, kernels read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.steps.pixels import PixelStep, PixelTable

__all__ = [
    "CoefficientTable",
    "Layout",
    "StepCoefficients",
    "check_dtype",
    "mixture",
    "pixel_mixture",
]


def check_dtype(dtype: torch.dtype) -> None:
    """Raise `InvalidShape` unless it is a floating-point one, which coefficients need."""
    if not dtype.is_floating_point:
        raise InvalidShape(f"coefficients need a floating-point dtype, got dtype={dtype}")


class Layout(NamedTuple):
    """Which column of a coefficient row scales what, for M objectives.

    Linear, C = 2M + 2: `x_scale, uncond[M], cond[M], noise_scale`,

        x_prev = x_scale x + sum_m (uncond_m u_m + cond_m c_m) + noise_scale z.

    Clipped, C = 5M + 3: the same, followed by `x0_x, x0_uncond[M], x0_cond[M], x0_scale[M]`, which
    add the clipped x_0 predictions,

        sum_m x0_scale_m clamp(x0_x x + x0_uncond_m u_m + x0_cond_m c_m, -r, r).

    Columns of one number are indices, columns per objective are slices of length M.

    Attributes:
        num_objectives: M.
        clips: Whether the layout has the x_0 columns.
    """

    num_objectives: int
    clips: bool

    @property
    def width(self) -> int:
        """C, the number of columns."""
        count = self.num_objectives
        return 5 * count + 3 if self.clips else 2 * count + 2

    @property
    def x_scale(self) -> int:
        """Of x_t."""
        return 0

    @property
    def uncond(self) -> slice:
        """Of the unconditional outputs."""
        return self._group(1)

    @property
    def cond(self) -> slice:
        """Of the conditional outputs."""
        return self._group(1 + self.num_objectives)

    @property
    def noise_scale(self) -> int:
        """Of z."""
        return 1 + 2 * self.num_objectives

    @property
    def x0_x(self) -> int:
        """Of x_t in the predictions of x_0; clipped layout only, as all that follow."""
        return self.noise_scale + 1

    @property
    def x0_uncond(self) -> slice:
        """Of the unconditional outputs in the predictions of x_0."""
        return self._group(self.x0_x + 1)

    @property
    def x0_cond(self) -> slice:
        """Of the conditional outputs in the predictions of x_0."""
        return self._group(self.x0_x + 1 + self.num_objectives)

    @property
    def x0_scale(self) -> slice:
        """Of the clipped predictions of x_0 in x_prev."""
        return self._group(self.x0_x + 1 + 2 * self.num_objectives)

    def of_output(self, m: int, *, uncond_only: bool) -> list[int]:
        """The columns that scale output m, or only its unconditional half."""
        groups = [self.uncond, self.x0_uncond] if self.clips else [self.uncond]
        if not uncond_only:
            groups += [self.cond, self.x0_cond, self.x0_scale] if self.clips else [self.cond]
        return [group.start + m for group in groups]

    def _group(self, start: int) -> slice:
        return slice(start, start + self.num_objectives)


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """The coefficients of one step: all that a step kernel sees. A zero masks the input it scales.

    Attributes:
        row: (B, C), no unit; B = 1 stands for every sample of the batch. `Layout` names the
            columns.
        num_objectives: M.
        clip_range: r in latent units, or None for the linear layout.
        pixels: What decides in place of `row` where weights differ between pixels; `row` then is
            that of the weights which an image has on average.
    """

    row: Tensor
    num_objectives: int
    clip_range: float | None
    pixels: PixelStep | None = None

    @property
    def layout(self) -> Layout:
        """Which column holds which coefficient."""
        return Layout(self.num_objectives, self.clip_range is not None)


@dataclass(frozen=True, slots=True)
class CoefficientTable:
    """The coefficients of all steps, in sampling order; `table[k]` is step k.

    Attributes:
        rows: (T, B, C) in the compute dtype and on the compute device; see `Layout`.
        timesteps: (T,), on the device of `rows`, decreasing: what the networks take beside x_t;
            int64, or floating in the dtype that `rows` were built in.
        input_scale: (T,), as `rows`: the networks take `input_scale x_t`; None: x_t itself.
        num_objectives: M.
        clip_range: x_0 predictions are clamped to [-clip_range, clip_range]; None: they are not.
        share: (T, B, M) float64 on the host, the fusion weights of means, or of predictions with
            `fusion="eps"`: sum 1 over M.
        std: (T, B) float64 on the host, sigma_w in latent units.
        needs_uncond: Whether some coefficient of an unconditional output is not zero.
        influence: (T, M) on the host, whether each output has influence on some sample in a step.
        reads: (T, M) on the host, whether it may have some with these timesteps and strengths,
            whatever the weights are.
        has_base: Whether the last objective is the base, which strength and ranges of timesteps
            add.
        pixels: Weights of every pixel; `rows`, `share` and `std` then are those of the weights that
            an image has on average. None: all pixels have the same.
    """

    rows: Tensor
    timesteps: Tensor
    input_scale: Tensor | None
    num_objectives: int
    clip_range: float | None
    share: Tensor
    std: Tensor
    needs_uncond: bool
    influence: Tensor
    reads: Tensor
    has_base: bool = False
    pixels: PixelTable | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, k: int) -> StepCoefficients:
        if not -len(self) <= k < len(self):
            raise IndexError(f"step {k} is outside the table of {len(self)} steps")
        pixels = None if self.pixels is None else self.pixels.step(k)
        return StepCoefficients(self.rows[k], self.num_objectives, self.clip_range, pixels)

    def adds_noise(self, k: int) -> bool:
        """Whether step k adds noise to some sample."""
        return bool(self.std[k].any())

    def mixture(self, k: int) -> StepCoefficients:
        """The coefficients of `sum_m share_m c_m` at step k: the outputs mixed, and no step taken.

        Where networks predict x_0, as k-diffusion's denoisers do, that is where the step heads for.
        """
        if self.pixels is not None:
            return pixel_mixture(self.pixels.step(k).share, self.pixels.parts[:, k].to(self.rows))
        return mixture(self.share[k].to(self.rows))

    def guided(self, scale: float) -> CoefficientTable:
        """The table with another guidance scale g for every sample and objective, up to rounding.

        `u + g (c - u)` has the coefficients (1 - g) a and g a of the same a, whatever g is.
        """
        layout = Layout(self.num_objectives, self.clip_range is not None)
        pixels = self.pixels
        if pixels is not None:
            pixels = replace(pixels, means=_guided(pixels.means, layout, scale))
        rows = _guided(self.rows, layout, scale)
        return replace(self, rows=rows, needs_uncond=scale != 1, pixels=pixels)

    def images(self, part: slice) -> CoefficientTable:
        """The table of some of its images."""
        return replace(
            self,
            rows=self.rows[:, part],
            share=self.share[:, part],
            std=self.std[:, part],
            pixels=None if self.pixels is None else self.pixels.images(part),
        )

    @property
    def active(self) -> list[bool]:
        """Whether each objective has influence on some sample at some step."""
        flags: list[bool] = self.influence.any(0).tolist()
        return flags

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CoefficientTable:
        """Return the table on a device, `rows` in a dtype; the float64 diagnostics stay."""
        if dtype is not None:
            check_dtype(dtype)
        scale = self.input_scale
        return replace(
            self,
            rows=self.rows.to(device=device, dtype=dtype),
            timesteps=self.timesteps.to(device=device),
            input_scale=None if scale is None else scale.to(device=device, dtype=dtype),
            pixels=None if self.pixels is None else self.pixels.to(device, dtype),
        )


def _guided(rows: Tensor, layout: Layout, scale: float) -> Tensor:
    """Rows with another guidance scale; see `CoefficientTable.guided`."""
    pairs = [(layout.uncond, layout.cond)]
    if layout.clips:
        pairs.append((layout.x0_uncond, layout.x0_cond))
    rows = rows.clone()
    for uncond, cond in pairs:
        both = rows[..., uncond] + rows[..., cond]
        rows[..., uncond], rows[..., cond] = (1 - scale) * both, scale * both
    return rows


def mixture(share: Tensor) -> StepCoefficients:
    """The coefficients of `sum_m share_m c_m`, for shares (B, M) without unit; no step is taken."""
    layout = Layout(share.shape[-1], clips=False)
    row = share.new_zeros(len(share), layout.width)
    row[:, layout.cond] = share
    return StepCoefficients(row, layout.num_objectives, None)


def pixel_mixture(share: Tensor, parts: Tensor | None = None) -> StepCoefficients:
    """The same for shares of every pixel.

    Args:
        share: (M, B, *S), no unit.
        parts: (M, B, N), which outputs the prediction of each objective is made of; None: its own.
    """
    count, batch = share.shape[:2]
    if parts is None:
        parts = torch.eye(count).to(share)[:, None].expand(count, batch, count)
    rows = torch.stack([mixture(part).row for part in parts])
    mean = (share.flatten(2).mean(2)[..., None] * parts).sum(0)
    pixels = PixelStep(rows, share.new_zeros(count, batch), share)
    return replace(mixture(mean), pixels=pixels)

# SPDX-License-Identifier: Apache-2.0
"""From a rule's Gaussians to the coefficients of steps with weights of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape, InvalidWeights
from msdda_fast.steps.pixels import PixelTable, PixelWeights
from msdda_fast.steps.rules import StepTerms
from msdda_fast.steps.strength import Folding
from msdda_fast.steps.table_rows import step_rows

__all__ = ["check_pixels", "pixel_table"]


def check_pixels(pixels: PixelWeights, weights: Tensor, batch_size: int) -> None:
    """Refuse preferences of the steps that weights of every pixel cannot go with.

    Args:
        pixels: Of (B, M, *S).
        weights: (T, B, M).
        batch_size: B of the request.

    Raises:
        InvalidShape: Another B or M.
        InvalidWeights: A preference is negative, or no objective covers a pixel.
    """
    count = weights.shape[-1]
    if pixels.shape[:2] != (batch_size, count):
        raise InvalidShape(
            f"weights of every pixel have shape {pixels.shape}, expected (B, M, *S) with B = "
            f"{batch_size} and M = {count}"
        )
    if bool((weights < 0).any()):
        raise InvalidWeights("negative weights (extrapolate=True) have no form for every pixel")
    empty = (pixels.of_rest(weights) == 0).all(-1).any(0)  # (B,)
    left = pixels.rest.flatten(1).any(1)
    if bool((empty & left).any()):
        b = int((empty & left).nonzero()[0])
        raise InvalidWeights(
            f"no objective covers some pixels of image {b}: those without a mask have the weight 0"
        )


def pixel_table(
    pixels: PixelWeights,
    weights: Tensor,
    mean: Tensor,
    terms: StepTerms,
    guidance: Tensor,
    fold: Folding | None,
    rates: Tensor | None,
) -> PixelTable:
    """Return what a table has beside its rows; float64 on the host.

    Args:
        pixels: Preferences of every pixel.
        weights: Of the steps, (T, B, M).
        mean: What an image has on average, (T, B, M); 0: no pixel has the objective.
        terms: The objectives' Gaussians.
        guidance, fold: As in `step_rows`.
        rates: (M,) of `zero_variance="ratio"`, or None.

    Raises:
        InvalidSchedule: Objectives of one image have levels of 0 and others.
    """
    count, active = mean.shape[-1], mean != 0
    own = [active * torch.eye(count, dtype=mean.dtype)[m] for m in range(count)]
    still = torch.zeros(mean.shape[:2], dtype=mean.dtype)
    return PixelTable(
        means=torch.stack([step_rows(one, still, terms, guidance, fold) for one in own]),
        numbers=_numbers(pixels, weights, active, terms, rates),
        own=pixels.own.transpose(0, 1),
        rest=pixels.rest,
        parts=torch.stack(own if fold is None else [fold.columns(one) for one in own]),
    )


def _numbers(
    pixels: PixelWeights, weights: Tensor, active: Tensor, terms: StepTerms, rates: Tensor | None
) -> Tensor:
    """The numbers of `PixelTable`.

    Where all tau = rate unit vanish, w_i / rate_i^2 stands in the place of w_i, or w_i / rates_i^2
    where the rates do, too.
    """
    rate = terms.rate.expand_as(weights)
    if bool(((active & (rate == 0)).any(-1) & (active & (rate > 0)).any(-1)).any()):
        raise InvalidSchedule(
            "weights of every pixel need noise levels that are all 0 or all positive; use another "
            "level in place of 0"
        )
    least = torch.where(active & (rate > 0), rate, torch.inf).amin(-1, keepdim=True)
    factor = torch.where(active & (rate > 0) & (terms.unit == 0), (least / rate) ** 2, 1.0)
    if rates is not None:
        factor = torch.where(rate == 0, (rates.amin() / rates) ** 2, factor)
    mixed = pixels.of_rest(weights) * factor
    return torch.stack([terms.std.expand_as(weights) ** 2, factor, mixed], 1).transpose(2, 3)

# SPDX-License-Identifier: Apache-2.0
r"""Masks: where in an image an objective acts.

A mask is the weight of its objective at each pixel of the image. Objectives without one share what
the masks leave, by their `weights`. Latents are coarser than images, so masks are blurred, that
their edges do not depend on the grid, and then averaged over the pixels of a latent. Both are
linear and keep constants, so weights that sum to 1 go on doing so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdda_fast.errors import InvalidShape, InvalidWeights, UnknownObjective
from msdda_fast.pipelines.brightness import brightness
from msdda_fast.steps.pixels import PixelWeights

__all__ = ["MasksLike", "Regions", "check_masks", "check_softness"]

#: A mask by the name of its objective, or a list with one such mapping, or None, per prompt.
MasksLike: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]

#: How far a sum of masks of 8 bits may be from 1: each of several is rounded.
TOLERANCE = 1.5 / 255


@dataclass(frozen=True, slots=True)
class Regions:
    """Checked masks of B images; `check_masks` makes them.

    Attributes:
        names: Of the M objectives.
        masks: (B, M, H, W) float64, pixels of the image; 0 for objectives without a mask.
        masked: (B, M), whether an objective has one.
        softness: Standard deviation of the blur, pixels of the image; None: one latent pixel.
    """

    names: tuple[str, ...]
    masks: Tensor
    masked: Tensor
    softness: float | None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), pixels of the image."""
        height, width = self.masks.shape[2:]
        return height, width

    def covered_with(self, weights: Tensor) -> Regions:
        """Return them for preferences of the steps; where masks alone must cover, they sum to 1.

        Args:
            weights: (T, B, M).

        Raises:
            InvalidWeights: Masks leave a pixel to objectives of weight 0.
        """
        free = torch.where(self.masked, 0.0, weights)
        alone = (free.sum(-1) == 0).any(0) & self.masked.any(1)  # (B,)
        if not bool(alone.any()):
            return self
        total = self.masks.sum(1)
        wrong = alone[:, None, None] & (total < 1 - TOLERANCE)
        if bool(wrong.any()):
            b, row, column = wrong.nonzero()[0].tolist()
            others = [
                name
                for name, has in zip(self.names, self.masked[b].tolist(), strict=True)
                if not has
            ]
            why = f"; without a mask, and with weight 0: {', '.join(others)}" if others else ""
            raise InvalidWeights(
                f"no objective covers the pixel in row {row}, column {column} of image {b}: the "
                f"masks of {self._masked_names(b)} sum to {float(total[b, row, column]):.4g} "
                f"there{why}"
            )
        whole = self.masks / total[:, None]
        return replace(self, masks=torch.where(alone[:, None, None, None], whole, self.masks))

    def coarse(self) -> PixelWeights:
        """Return their averages over the image, as weights of latents of one pixel."""
        own = self.masks.mean((2, 3), keepdim=True)
        return PixelWeights(own, 1 - own.sum(1), ~self.masked)

    def on(self, height: int, width: int, scale: float) -> PixelWeights:
        """Return them on the grid of latents, (B, M, h, w): blurred, then averaged.

        Args:
            height, width: (h, w) of the latents.
            scale: Pixels of the image per latent pixel, the softness of those who give none.
        """
        std = scale if self.softness is None else self.softness
        rows, columns = (
            _averages(size, out, std) for size, out in zip(self.size, (height, width), strict=True)
        )
        # an expanded batch is computed once
        once = self.masks[:1] if self.masks.stride(0) == 0 else self.masks
        own = rows @ once @ columns.T
        rest = rows @ (1 - once.sum(1)).clamp(min=0) @ columns.T
        batch = len(self.masks)
        return PixelWeights(
            own.expand(batch, *own.shape[1:]), rest.expand(batch, *rest.shape[1:]), ~self.masked
        )

    def _masked_names(self, b: int) -> str:
        has = self.masked[b].tolist()
        return ", ".join(name for name, masked in zip(self.names, has, strict=True) if masked)


def check_masks(
    masks: MasksLike | None,
    objectives: Sequence[str],
    images: int,
    height: int | None = None,
    width: int | None = None,
    *,
    images_per_prompt: int = 1,
    softness: float | None = None,
) -> Regions | None:
    """Return checked masks; None: there are none.

    Args:
        masks: A mask by the name of its objective, or a list with one such mapping, or None, per
            prompt. A mask is a PIL image, of which the brightness counts, or numbers in [0, 1], (H,
            W) or, outside of lists, (B, H, W).
        objectives: Names of all M, in order.
        images: B.
        height, width: Of the images, in pixels; None: the masks say.
        images_per_prompt: How many neighbouring images a prompt has.
        softness: Standard deviation of the blur, pixels of the image; 0: none; None: one latent
            pixel.

    Raises:
        UnknownObjective: A mask is for an objective that does not exist.
        InvalidShape: A mask is no image, of another size than the image, or there are not as many
            mappings as prompts.
        InvalidWeights: A mask is outside [0, 1], masks sum to more than 1, or to less where every
            objective has one, or the softness is negative or not finite.
    """
    check_softness(softness, masks)
    if masks is None:
        return None
    by_prompt = isinstance(masks, (list, tuple))
    entries: list[Any] = list(masks) if by_prompt else [masks]
    copies = images_per_prompt if by_prompt else 1
    if by_prompt and len(entries) * images_per_prompt != images:
        raise InvalidShape(
            f"masks are a list of {len(entries)}, expected one mapping, or None, for each of the "
            f"{images // images_per_prompt} prompts"
        )
    read = [_read(entry, objectives, (height, width)) for entry in entries]
    if not any(read):
        return None
    sizes = {tuple(mask.shape[-2:]): name for entry in read for name, mask in entry.items()}
    if len(sizes) > 1:
        (size, name), (other, other_name) = list(sizes.items())[:2]
        raise InvalidShape(
            f"masks of {name!r} and {other_name!r} have {size[0]} x {size[1]} and {other[0]} x "
            f"{other[1]} pixels (height x width), expected one size"
        )
    batch = max((len(mask) for entry in read for mask in entry.values()), default=1)
    if batch not in (1, images) or (by_prompt and batch > 1):
        raise InvalidShape(
            f"masks (B, H, W) are for {batch} images, expected {1 if by_prompt else images}"
        )
    values = torch.stack([_stacked(entry, objectives, batch, *next(iter(sizes))) for entry in read])
    values = values.flatten(0, 1)  # (prompts or images, M, H, W)
    masked = torch.tensor([[name in entry for name in objectives] for entry in read])
    if by_prompt:
        values, masked = (value.repeat_interleave(copies, 0) for value in (values, masked))
    regions = Regions(tuple(objectives), _normalised(values, masked, objectives), masked, softness)
    return replace(
        regions,
        masks=regions.masks.expand(images, -1, -1, -1),
        masked=masked.expand(images, -1),
    )


def check_softness(softness: float | None, masks: MasksLike | None) -> None:
    """Raise `InvalidWeights` unless it is None, or goes with masks and is finite and >= 0."""
    if softness is None:
        return
    if masks is None:
        raise InvalidWeights("mask_softness is given without masks")
    if not isinstance(softness, (int, float)) or not 0 <= softness <= torch.finfo(torch.double).max:
        raise InvalidWeights(
            f"mask_softness must be a finite number of pixels, 0 or more, got {softness!r}"
        )


def _read(
    entry: Any,  # noqa: ANN401 - what it is, is the question
    objectives: Sequence[str],
    size: tuple[int | None, int | None],
) -> dict[str, Tensor]:
    """The masks of one mapping, (1 or B, H, W) float64."""
    if entry is None:
        return {}
    if not isinstance(entry, Mapping):
        raise InvalidShape(
            f"masks must be a mapping from objectives to images, or a list with one, or None, per "
            f"prompt, got {type(entry).__name__}"
        )
    made = {}
    for name, given in entry.items():
        if name not in objectives:
            raise UnknownObjective(
                f"masks: unknown objective {name!r}; known: {', '.join(objectives)}"
            )
        mask = made[name] = _numbers(name, given)
        expected = tuple(
            own if asked is None else asked for own, asked in zip(mask.shape[1:], size, strict=True)
        )
        if mask.shape[1:] != expected:
            raise InvalidShape(
                f"the mask of {name!r} has {mask.shape[1]} x {mask.shape[2]} pixels (height x "
                f"width), expected those of the image, {expected[0]} x {expected[1]}"
            )
    return made


def _numbers(name: str, mask: Any) -> Tensor:  # noqa: ANN401 - what it is, is the question
    """One mask, (1 or B, H, W) float64 on the host."""
    try:
        if isinstance(mask, Image.Image):
            values = torch.from_numpy(np.array(brightness(mask))).double() / 255
        else:
            values = torch.as_tensor(mask).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidShape(
            f"the mask of {name!r} is no image of 8 bits and no array of numbers: {error}"
        ) from None
    if values.ndim not in (2, 3) or values.numel() == 0:
        raise InvalidShape(
            f"the mask of {name!r} has shape {tuple(values.shape)}, expected (H, W) or (B, H, W)"
        )
    inside = (values >= 0) & (values <= 1)  # false for NaN
    if not bool(inside.all()):
        *_, row, column = (~inside).nonzero()[0].tolist()
        raise InvalidWeights(
            f"the mask of {name!r} is {float(values[~inside][0]):g} in row {row}, column "
            f"{column}: weights of pixels are in [0, 1] (divide arrays of 8 bits by 255)"
        )
    return values if values.ndim == 3 else values[None]


def _stacked(
    entry: Mapping[str, Tensor], objectives: Sequence[str], batch: int, height: int, width: int
) -> Tensor:
    """(B, M, H, W), 0 for objectives without a mask."""
    none = torch.zeros(1, height, width, dtype=torch.float64)
    masks = [entry.get(name, none).expand(batch, height, width) for name in objectives]
    return torch.stack(masks, 1)


def _normalised(masks: Tensor, masked: Tensor, objectives: Sequence[str]) -> Tensor:
    """Masks whose sum is at most 1, and 1 where every objective has one."""
    total = masks.sum(1)
    whole = masked.all(1)[:, None, None]
    wrong = (total > 1 + TOLERANCE) | (whole & (total < 1 - TOLERANCE))
    if bool(wrong.any()):
        b, row, column = wrong.nonzero()[0].tolist()
        at = masks[b, :, row, column].tolist()
        has = masked[b % len(masked)].tolist()
        shown = ", ".join(
            f"{name} {value:.4g}" for name, value, on in zip(objectives, at, has, strict=True) if on
        )
        expected = (
            "1, since every objective has one" if bool(whole[b % len(whole)]) else "at most 1"
        )
        raise InvalidWeights(
            f"masks sum to {float(total[b, row, column]):.4g} in row {row}, column {column} of "
            f"image {b} ({shown}): it must be {expected}"
        )
    divisor = torch.where(whole, total, total.clamp(min=1))
    return masks / divisor[:, None]


def _averages(size: int, out: int, std: float) -> Tensor:
    """A blur with standard deviation `std` and averages over equal parts, (out, size) float64.

    Rows sum to 1: at the border of the image the blur sees what is inside.
    """
    edges = torch.arange(out + 1, dtype=torch.float64) * (size / out)
    pixels = torch.arange(size, dtype=torch.float64)
    upper = torch.minimum(edges[1:, None], pixels + 1)
    lower = torch.maximum(edges[:-1, None], pixels)
    area = (upper - lower).clamp(min=0)
    if std > 0:
        blur = (-(((pixels[:, None] - pixels) / std) ** 2) / 2).exp()  # std**2 may be 0 or inf
        area = area @ (blur / blur.sum(1, keepdim=True))
    return area / area.sum(1, keepdim=True)

# SPDX-License-Identifier: Apache-2.0
"""Where the pixels of an image are in a pipeline's latents, packed ones included."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.regions import Regions
from msdda_fast.steps.pixels import PixelWeights

__all__ = ["SCALES", "latent_scale", "requested_size", "weights_of_latents"]

#: Attributes of pipelines of which the first that there is says that.
SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")


def latent_scale(pipe: Any) -> int:  # noqa: ANN401 - any pipeline
    """Return how many pixels of the image are one of the latents, in height and width.

    Raises:
        UnsupportedNetwork: The pipeline does not say.
    """
    for name in SCALES:
        if isinstance(scale := getattr(pipe, name, None), int):
            return scale
    raise UnsupportedNetwork(
        f"masks: {type(pipe).__name__} does not say how many pixels of the image a pixel of its "
        f"latents is ({', '.join(SCALES)}), so masks cannot be placed in them"
    )


def requested_size(pipe: Any, given: Mapping[str, Any]) -> tuple[int | None, int | None]:  # noqa: ANN401
    """Return (height, width) of the images that a call asks for, as far as it says.

    Args:
        pipe: Any pipeline.
        given: The arguments of the call by name.
    """
    side = getattr(pipe, "default_sample_size", None)
    default = None
    if isinstance(side, int) and given.get("image") is None:
        default = side * latent_scale(pipe)
    height, width = (given.get(name) for name in ("height", "width"))
    return height or default, width or default


def weights_of_latents(pipe: Any, regions: Regions, sample: Tensor) -> PixelWeights:  # noqa: ANN401
    """Return the weights of regions in the place of the latents, (B, M, *S).

    Nothing here is written per family: latents whose last two axes are those of the image take the
    weights as they are, others are packed by the pipeline's own method.

    Args:
        pipe: The pipeline whose loop it is.
        regions: Of the call.
        sample: (B, *S), the state.

    Raises:
        InvalidShape: The latents are of images of another size than the masks.
        UnsupportedNetwork: The latents have no such axes and cannot be packed.
    """
    scale = latent_scale(pipe)
    height, width = regions.size
    h, w = height // scale, width // scale
    if (h * scale, w * scale) == (height, width) and h and w:
        if sample.ndim >= 4 and tuple(sample.shape[-2:]) == (h, w):
            return regions.on(h, w, scale).in_latents(sample.ndim - 3)
        if sample.ndim == 3 and hasattr(pipe, "_pack_latents"):
            weights = regions.on(h, w, scale)
            try:
                packed = weights.reshaped(lambda one: _packed(pipe, one, sample))
            except (AttributeError, RuntimeError, TypeError, ValueError, ZeroDivisionError):
                packed = weights  # latents of something else, such as sound
            if packed.shape[2:] == tuple(sample.shape[1:]):
                return packed
    if sample.ndim >= 4:
        raise InvalidShape(
            f"masks of {height} x {width} pixels (height x width) do not fit latents of shape "
            f"{tuple(sample.shape)}, whose pixels are {scale} x {scale} of the image: expected "
            f"{sample.shape[-2] * scale} x {sample.shape[-1] * scale}"
        )
    raise UnsupportedNetwork(
        f"masks of {height} x {width} pixels (height x width) cannot be placed in latents of shape "
        f"{tuple(sample.shape)}, which {type(pipe).__name__} does not pack from images of that "
        "size"
    )


def _packed(pipe: Any, grid: Tensor, sample: Tensor) -> Tensor:  # noqa: ANN401
    """(N, h, w) -> (N, *S) of packed latents, as the pipeline's own `_pack_latents` does it.

    What it asks for tells which of the methods of diffusers it is. The result may be of another
    shape, where the latents are not what it packs.
    """
    names = inspect.signature(pipe._pack_latents).parameters
    count, height, width = grid.shape
    depth = sample.shape[-1]
    if "num_channels_latents" in names:
        probe = _pack(pipe, grid[:1, None], 1, 1, height, width)
        channels = max(depth // probe.shape[-1], 1)
        grid = grid[:, None].expand(-1, channels, -1, -1)
        return _pack(pipe, grid, count, channels, height, width)
    if "patch_size_t" in names:
        p, p_t = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        frames = sample.shape[1] * p * p * p_t // (height * width)
        channels = max(depth // (p * p * p_t), 1)
        return _pack(pipe, grid[:, None, None].expand(-1, channels, frames, -1, -1), p, p_t)
    grid = grid[:, None]
    if hasattr(pipe, "_patchify_latents"):
        grid = pipe._patchify_latents(grid)
    packed = _pack(pipe, grid)
    return packed.repeat(1, 1, max(depth // packed.shape[-1], 1))


def _pack(pipe: Any, latents: Tensor, *sizes: int) -> Tensor:  # noqa: ANN401
    packed: Tensor = pipe._pack_latents(latents.contiguous(), *sizes)
    return packed

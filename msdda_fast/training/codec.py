# SPDX-License-Identifier: Apache-2.0
"""Between images and the latents that a UNet sees, by a pipeline's own autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline

BATCH = 16  # images through the autoencoder at once


def latent_shape(pipe: MSDDAPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the latents the pipeline draws by default."""
    config = pipe.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def decoder(pipe: MSDDAPipeline) -> Callable[[Tensor], Tensor]:
    """Return latents (b, C, H, W) -> images (b, 3, height, width) float32 in [0, 1].

    As 8-bit pictures have it: a reward sees what a file would hold.
    """

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        vae = pipe.vae
        images = [
            vae.decode(part.to(vae.device, vae.dtype) / vae.config.scaling_factor).sample
            for part in torch.split(latents, BATCH)
        ]
        return ((torch.cat(images).float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255

    return decode


def encoder(pipe: MSDDAPipeline) -> Callable[[Tensor], Tensor]:
    """Return images (b, 3, height, width) in [0, 1] -> latents (b, C, H, W) float32.

    Where the autoencoder gives a distribution, its mode.
    """

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        vae = pipe.vae
        latents = []
        for part in torch.split(images, BATCH):
            out = vae.encode((2 * part - 1).to(vae.device, vae.dtype))
            clean = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
            latents.append(clean.float() * vae.config.scaling_factor)
        return torch.cat(latents)

    return encode

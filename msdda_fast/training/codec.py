# SPDX-License-Identifier: Apache-2.0
"""Between images and the latents that a UNet sees, by a pipeline's own autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msdda_fast.pipelines.stable_diffusion.decoding import decode as vae_decode
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.training.collect import SampleFn
from msdda_fast.training.storage import digest

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
        images = [vae_decode(vae, part.to(vae.device)) for part in torch.split(latents, BATCH)]
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


def image_size(pipe: MSDDAPipeline) -> tuple[int, int]:
    """(height, width) in pixels of the images the pipeline draws by default."""
    _, height, width = latent_shape(pipe)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def codec_id(pipe: MSDDAPipeline) -> str:
    """What latents of the same image have in common: a digest of the autoencoder."""
    scale = torch.tensor(pipe.vae.config.scaling_factor)
    return digest(scale, *pipe.vae.state_dict().values())


def sample_fn(pipe: MSDDAPipeline, *, num_steps: int, guidance_scale: float) -> SampleFn:
    """Return (prompts, seeds) -> (latents, images in [0, 1]) of the pipeline's one objective."""
    pipe.set_progress_bar_config(disable=True)
    (name,) = pipe.objectives
    decode = decoder(pipe)

    @torch.inference_mode()
    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        latents = pipe(
            list(prompts),
            weights={name: 1.0},
            seed=list(seeds),
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
        return latents, decode(latents)

    return sample


@torch.no_grad()
def encode_prompts(pipe: MSDDAPipeline, prompts: Sequence[str]) -> Tensor:
    """Encode prompts with the pipeline's own text encoder; shape (P, L, D)."""
    embeds = [
        pipe.encode_prompt(list(prompts[at : at + BATCH]), pipe.device, 1, False)[0]
        for at in range(0, len(prompts), BATCH)
    ]
    return torch.cat(embeds)

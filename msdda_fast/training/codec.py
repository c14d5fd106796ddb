# SPDX-License-Identifier: Apache-2.0
"""Convert between images and the UNet's latents with the autoencoder of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msdda_fast.pipelines.identity import base_digest, model_identity
from msdda_fast.pipelines.stable_diffusion.decoding import decode as vae_decode
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.training.collect import Sampler

BATCH = 16  # images through the autoencoder at once


def latent_shape(pipe: MSDDAPipeline) -> tuple[int, int, int]:
    """Return (C, H, W) of the latents that the pipeline draws by default."""
    config = pipe.unet.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


def decoder(pipe: MSDDAPipeline) -> Callable[[Tensor], Tensor]:
    """Return a function from latents (b, C, H, W) to images (b, 3, height, width) in [0, 1].

    Images are float32, rounded to 8 bits: a reward sees what a file would contain.
    """

    vae = pipe.vae  # in the closure: a run's fingerprint counts it

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        images = [vae_decode(vae, part.to(vae.device)) for part in torch.split(latents, BATCH)]
        return ((torch.cat(images).float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255

    return decode


def soft_decoder(pipe: MSDDAPipeline) -> Callable[[Tensor], Tensor]:
    """Return `decoder`'s function with gradients from images to latents: nothing is rounded."""

    vae = pipe.vae.requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        images = [vae_decode(vae, part.to(vae.device)) for part in torch.split(latents, BATCH)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    return decode


def encoder(pipe: MSDDAPipeline) -> Callable[[Tensor], Tensor]:
    """Return a function from images (b, 3, height, width) in [0, 1] to latents (b, C, H, W).

    Latents are float32; if the autoencoder gives a distribution, they are its mode.
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
    """Return (height, width) in pixels of the images that the pipeline draws by default."""
    _, height, width = latent_shape(pipe)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def codec_id(pipe: MSDDAPipeline) -> str:
    """Return a digest of the autoencoder, which decides the latents of an image."""
    return base_digest(pipe.vae)


def sample_fn(pipe: MSDDAPipeline, *, num_steps: int, guidance_scale: float) -> Sampler:
    """Return a function from prompts and seeds to latents and images of the only objective."""
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

    settings = {"num_steps": num_steps, "guidance_scale": guidance_scale, **model_identity(pipe)}
    return Sampler(sample, settings)


@torch.no_grad()
def encode_prompts(pipe: MSDDAPipeline, prompts: Sequence[str]) -> Tensor:
    """Encode prompts with the pipeline's own text encoder; shape (P, L, D)."""
    embeds = [
        pipe.encode_prompt(list(prompts[at : at + BATCH]), pipe.device, 1, False)[0]
        for at in range(0, len(prompts), BATCH)
    ]
    return torch.cat(embeds)

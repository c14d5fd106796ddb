# SPDX-License-Identifier: Apache-2.0
"""Deterministic paths of the base model from noisy states to images, which the accelerator learns.

A path is the base's own solution of the probability-flow ODE in DDIM steps, kept with every state
on the way: each is a sample of what the network meets at that timestep, and the states after it are
where a consistency model should go from there. Paths start at pure noise, or at a noised render:
whatever the base gets wrong at first, later states of the latter are those of good images.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msdda_fast import resume
from msdda_fast.emoji.captions import CaptionSampler
from msdda_fast.emoji.render import Renderer
from msdda_fast.files import write_atomically
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.training.codec import encode_prompts, encoder, latent_shape

SPACING = 50  # timesteps between states: 20 DDIM steps from noise
#: Becomes a part of the accelerator, as is usual: without guidance the base's ODE errs so much more
#: than its sampling with noise that an accelerator of it was worse than none.
GUIDANCE_SCALE = 2.0
SHARD = 128  # paths in one file
ROWS = 64  # paths through the network at once
RENDER_SEED = 1000  # of the first file of paths from renders


class Paths(NamedTuple):
    """N paths of at most K states each, and where they end.

    Attributes:
        timesteps: (N, K) int64, falling.
        states: (N, K + 1, C, H, W), float16; the last is the clean sample.
        first: Where each path starts, (N,) int64; states before that are not there.
        embeds: Encoded captions, (N, L, D), float16.
    """

    timesteps: Tensor
    states: Tensor
    first: Tensor
    embeds: Tensor


def teacher_paths(
    pipe: MSDDAPipeline, renderer: Renderer, work: Path, *, from_noise: int, from_renders: int
) -> Paths:
    """Draw paths, both numbers multiples of `SHARD`; files in `work` are not drawn again.

    Raises:
        ResumeMismatch: `work` holds paths of another model or other renders.
    """
    networks = {
        "denoiser": resume.digest(pipe.unet),
        "text_encoder": resume.digest(pipe.text_encoder),
        "spacing": SPACING,
        "guidance_scale": GUIDANCE_SCALE,
    }
    seen = {**networks, "vae": resume.digest(pipe.vae), "renderer": resume.digest(renderer)}
    shards = [_shard(pipe, None, seed, work, networks) for seed in range(from_noise // SHARD)]
    for seed in range(RENDER_SEED, RENDER_SEED + from_renders // SHARD):
        shards.append(_shard(pipe, renderer, seed, work, seen))
    return Paths(*(torch.cat(parts) for parts in zip(*shards, strict=True)))


def _shard(
    pipe: MSDDAPipeline,
    renderer: Renderer | None,
    seed: int,
    work: Path,
    settings: dict[str, object],
) -> Paths:
    path, own = work / f"paths-{seed:03d}.pt", resume.mark(settings)
    if not path.is_file():
        kept = {**_draw(pipe, renderer, seed)._asdict(), "settings": own}
        write_atomically(path, lambda partial: torch.save(kept, partial))
    stored = torch.load(path, weights_only=True)
    resume.require_same(path, stored.pop("settings"), own)
    return Paths(**stored)


@torch.no_grad()
def _draw(pipe: MSDDAPipeline, renderer: Renderer | None, seed: int) -> Paths:
    sampler, generator = CaptionSampler(seed=seed), torch.Generator().manual_seed(seed)
    pairs = [sampler() for _ in range(SHARD)]
    embeds = encode_prompts(pipe, [caption for caption, _ in pairs])
    empty = encode_prompts(pipe, [""])
    noise = torch.randn(SHARD, *latent_shape(pipe), generator=generator)
    # every other file between the timesteps of the last, so that all of LCM's grid is met
    timesteps = torch.arange(999 - seed % 2 * SPACING // 2, 0, -SPACING)
    first = torch.zeros(SHARD, dtype=torch.long)
    starts = noise
    if renderer is not None:
        x_0 = encoder(pipe)(renderer([scene for _, scene in pairs], generator))
        # sorted, so that the network runs on all paths that have begun
        first = torch.randint(len(timesteps), (SHARD,), generator=generator).sort().values
        starts = pipe.scheduler.add_noise(x_0, noise, timesteps[first])
    alpha_bar = pipe.scheduler.alphas_cumprod
    ends = torch.cat([alpha_bar[timesteps[1:]], torch.ones(1)])  # the last step predicts x_0
    states, x = [], starts[:0]
    for k, (t, end) in enumerate(zip(timesteps, ends, strict=True)):
        x = torch.cat([x, starts[first == k]])
        states.append(torch.cat([x, starts[len(x) :]]))
        rows = zip(torch.split(x, ROWS), torch.split(embeds[: len(x)], ROWS), strict=True)
        eps = torch.cat([_guided(pipe.unet, part, t, text, empty) for part, text in rows])
        x_0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x = end.sqrt() * x_0 + (1 - end).sqrt() * eps
    states.append(x)
    stacked = torch.stack(states, dim=1).half()
    return Paths(timesteps.repeat(SHARD, 1), stacked, first, embeds.half())


def _guided(unet: nn.Module, x: Tensor, t: Tensor, text: Tensor, empty: Tensor) -> Tensor:
    """Return the base's prediction of noise with guidance, like x, (n, C, H, W)."""
    context = torch.cat([empty.expand_as(text), text])
    uncond, cond = unet(torch.cat([x, x]), t, context, return_dict=False)[0].chunk(2)
    eps: Tensor = uncond + GUIDANCE_SCALE * (cond - uncond)
    return eps

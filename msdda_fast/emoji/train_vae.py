# SPDX-License-Identifier: Apache-2.0
"""Train the autoencoder of the shipped model on rendered scenes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdda_fast import resume
from msdda_fast.emoji.architectures import Autoencoder
from msdda_fast.emoji.checkpoint import Checkpoint, TrainingLog
from msdda_fast.emoji.precision import fast_autocast
from msdda_fast.emoji.render import Renderer
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted


def train_vae(
    vae: Autoencoder, renderer: Renderer, work: Path, *, steps: int = 2000, batch: int = 16
) -> None:
    """Train `vae` in place; resumes from `work/vae.pt`.

    Loss: L1 of the pixels + 0.5 L1 of their differences, with noise of 0.05 on the latents (a
    smooth decoder forgives small denoising errors). Latents are pulled towards N(0, 1) per channel,
    because the Stable Diffusion pipeline has only a scalar scaling factor.
    """
    _train(vae, list(vae.parameters()), renderer, work, "vae", steps, batch)


def refine_decoder(
    vae: Autoencoder, renderer: Renderer, work: Path, *, steps: int = 1200, batch: int = 16
) -> None:
    """Continue training the decoder with a frozen encoder: the denoiser's latents do not change.

    Resumes from `work/decoder.pt`.
    """
    vae.requires_grad_(False)
    parameters = list(vae.decoder.requires_grad_(True).parameters())
    _train(vae, parameters, renderer, work, "decoder", steps, batch)


def _train(
    vae: Autoencoder, parameters: list[nn.Parameter], renderer: Renderer, work: Path, name: str,
    steps: int, batch: int,
) -> None:  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.03
    )
    settings = {
        "steps": steps, "batch": batch, "start": resume.digest(vae),
        "scenes": resume.digest(renderer),
    }  # fmt: skip
    checkpoint = Checkpoint(
        work / f"{name}.pt", settings, model=vae, optimizer=optimizer, schedule=schedule
    )
    log = TrainingLog(work / f"{name}.jsonl", start := checkpoint.restore())
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        x = 2 * renderer(random_scenes(batch, generator), generator) - 1
        with fast_autocast():
            z = vae.encode(x).latents.float()
            noise = 0.05 * torch.randn(z.shape, generator=generator)
            y = vae.decode(z + noise).sample.float()
        pixels = F.l1_loss(y, x)
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3))
        moments = mean.square().mean() + (var - 1).square().mean()
        loss = pixels + 0.5 * edges + 0.02 * moments
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        log.add(step, loss=loss, l1=pixels, mean=mean.abs().max(), std=var.sqrt().mean())
        checkpoint.save_when_due(step + 1, steps)


def random_scenes(
    count: int, generator: torch.Generator, objects: tuple[str, ...] = OBJECTS
) -> list[tuple[Painted, ...]]:
    """Draw scenes with uniform objects and colours, a third of them pairs."""
    draws: Tensor = torch.rand(count, 5, generator=generator)
    scenes: list[tuple[Painted, ...]] = []
    for pair, o1, c1, o2, c2 in draws.tolist():
        first = Painted(objects[int(o1 * len(objects))], COLORS[int(c1 * 10)])
        second = Painted(objects[int(o2 * len(objects))], COLORS[int(c2 * 10)])
        scenes.append((first, second) if pair < 0.35 else (first,))
    return scenes

# SPDX-License-Identifier: Apache-2.0
r"""Distil the accelerator of the shipped model: `python -m msdda_fast.emoji.distil`.

An adapter with which the base takes few large steps. It learns TCD's loss (2402.19159) on paths of
the base's probability-flow ODE: from the state at t straight to the path's state at a random s < t,

    loss = huber( sqrt(abar_s) x0hat + sqrt(1 - abar_s) epshat - x_s ).

TCD takes x_s from a moving average of the student, one solver step below t, because it has no path;
here the base's own path is at hand. Resumes from checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from msdda_fast import resume
from msdda_fast.assets import resolve
from msdda_fast.emoji.align import base_policy
from msdda_fast.emoji.checkpoint import Checkpoint, TrainingLog
from msdda_fast.emoji.packaging import add_accelerator
from msdda_fast.emoji.render import Renderer
from msdda_fast.emoji.teacher_paths import Paths, teacher_paths
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.training.adapter import ATTENTION_PROJECTIONS, add_lora, save_lora

STYLES = ("noto", "fluentflat")  # of the images that the model learnt to draw
RANK = 12
#: Every large layer of the transformers and resnets.
TARGETS = (
    *ATTENTION_PROJECTIONS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
)  # fmt: skip
FROM_NOISE, FROM_RENDERS = 768, 512  # paths
STEPS, BATCH, LR = 300, 32, 1e-3
SCHEDULER, FEW = "LCMScheduler", 4  # with which it is sampled, chosen on training prompts
HUBER = 1e-3  # below it, the loss is a square


def distil(base: Path, work: Path, *, steps: int = STEPS) -> Path:
    """Train the accelerator of the model folder `base` and return its LoRA folder (fp16).

    Args:
        base: Of the shipped Stable Diffusion.
        work: Receives paths, checkpoint and log.
        steps: Of the optimiser.

    Raises:
        ResumeMismatch: `work` holds a run of another model or other settings.
    """
    work.mkdir(parents=True, exist_ok=True)
    pipe = MSDDAPipeline.from_pretrained(base, objectives=base_policy(1.0))
    paths = teacher_paths(
        pipe, Renderer(STYLES), work, from_noise=FROM_NOISE, from_renders=FROM_RENDERS
    )
    unet, alpha_bar = pipe.unet, pipe.scheduler.alphas_cumprod
    settings = {
        "steps": steps, "batch": BATCH, "lr": LR, "rank": RANK, "base": resume.digest(unet),
        "paths": resume.digest(*paths),
    }  # fmt: skip
    parameters = nn.ParameterList(add_lora(unet, rank=RANK, target_modules=TARGETS, seed=4))
    average = AveragedModel(
        parameters,
        multi_avg_fn=get_ema_multi_avg_fn(0.99),  # type: ignore[no-untyped-call]
    )
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LR, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    checkpoint = Checkpoint(
        work / "distil.pt",
        settings,
        parameters=parameters,
        average=average,
        optimizer=optimizer,
        schedule=schedule,
    )
    log = TrainingLog(work / "distil.jsonl", start := checkpoint.restore())
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        loss = path_loss(unet, paths, alpha_bar, generator)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(parameters)
        log.add(step, loss=loss, grad_norm=norm)
        checkpoint.save_when_due(step + 1, steps)
    with torch.no_grad():
        for own, mean in zip(parameters, average.module.parameters(), strict=True):
            own.copy_(mean)
    return save_lora(unet, work / "accelerator", dtype=torch.float16).parent


def path_loss(
    unet: nn.Module, paths: Paths, alpha_bar: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the mean loss of going from random states of `BATCH` paths to random later ones.

    Args:
        unet: Called as `unet(x_t, t, context, return_dict=False)[0]`, predicts noise.
        paths: The base's.
        alpha_bar: Of the noise schedule, by timestep.
        generator: Draws paths, t and s.
    """
    count, last = paths.timesteps.shape
    rows = torch.randint(count, (BATCH,), generator=generator)
    after = last - paths.first[rows]  # steps that each path has
    at = last - 1 - (torch.rand(BATCH, generator=generator) * after).long()
    to = at + 1 + (torch.rand(BATCH, generator=generator) * (last - at)).long()
    t = paths.timesteps[rows, at]
    x_t, x_s = paths.states[rows, at].float(), paths.states[rows, to].float()
    ends = torch.cat([alpha_bar[paths.timesteps[rows]], torch.ones(BATCH, 1)], dim=1)
    a, s = (v[:, None, None, None] for v in (alpha_bar[t], ends.gather(1, to[:, None])[:, 0]))
    eps = unet(x_t, t, paths.embeds[rows].float(), return_dict=False)[0]
    x_0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    miss = s.sqrt() * x_0 + (1 - s).sqrt() * eps - x_s
    loss: Tensor = ((miss**2 + HUBER**2).sqrt() - HUBER).mean()
    return loss


def ship(accelerator: Path, work: Path, folder: Path) -> None:
    """Put the accelerator of `work` into the model's folder, as the one of its own."""
    made = Accelerator(accelerator, scheduler=SCHEDULER, steps=FEW)
    add_accelerator(folder, accelerator, work / "distil.jsonl", made)


def main(
    work: Annotated[Path, typer.Option(help="Folder of checkpoints.")] = Path("out/distil"),
) -> None:
    """Distil the accelerator of the model and put it there; the same command resumes."""
    ship(distil(folder := resolve("msdda-fast/emoji"), work), work, folder)


if __name__ == "__main__":
    typer.run(main)

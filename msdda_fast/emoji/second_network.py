# SPDX-License-Identifier: Apache-2.0
"""Distil an aligned model into another network: `python -m msdda_fast.emoji.second_network`.

The student is half as wide as the shipped denoiser and has no middle block, so that its weights
cannot be averaged with those of an adapter of the shipped network. It learns the predictions of the
shipped denoiser with the adapter `ADAPTER`, in its timesteps: the mean of
||eps_student - eps_teacher||^2 over noisy latents of training scenes, at uniform timesteps, with
the shipped text encoder and autoencoder.

A few minutes of one core; the same command resumes. `benchmarks/two_networks.py` compares fusing
the student with the other adapter to switching between the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from msdda_fast import resume
from msdda_fast.assets import resolve
from msdda_fast.emoji.align import TIMESTEPS
from msdda_fast.emoji.architectures import TEXT_WIDTH
from msdda_fast.emoji.checkpoint import Checkpoint, TrainingLog
from msdda_fast.emoji.precision import fast_autocast
from msdda_fast.emoji.render import Renderer
from msdda_fast.emoji.train_base import Noising, cache_latents
from msdda_fast.files import write_atomically

ADAPTER = "consistency"
SCENES = 8_000
STEPS = 1300
PEAK_RATE = 2e-3
LOG_NAME = "training.jsonl"


def half_unet() -> UNet2DConditionModel:
    """Build the untrained student: 16x16 latents, 1.8 M parameters."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers: the number of heads
        norm_num_groups=8,
    )


def distil(
    student: nn.Module,
    teacher: nn.Module,
    text_encoder: nn.Module,
    scheduler: Noising,
    latents: Tensor,
    ids: Tensor,
    work: Path,
    *,
    steps: int = STEPS,
    batch: int = 32,
) -> None:
    """Train the student on the teacher's predictions; it ends with its moving average.

    Resumes from `work/distil.pt`; the curve is `work/training.jsonl`.

    Args:
        student: A UNet2DConditionModel.
        teacher: Maps (x_t, t, context) to noise predictions; in evaluation mode, stays as it is.
        text_encoder: Gives both their context.
        scheduler: Its noise schedule.
        latents: Clean latents x_0, (N, C, H, W), in the units of the denoisers.
        ids: Token ids of their captions, (N, L).
        work: Folder of checkpoint and curve.
        steps: Number of steps of AdamW, each on `batch` noisy latents.

    Raises:
        ResumeMismatch: `work` holds a run with other settings, networks or data.
    """
    average = AveragedModel(
        student,
        multi_avg_fn=get_ema_multi_avg_fn(0.995),  # type: ignore[no-untyped-call]
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    settings = {
        "steps": steps, "batch": batch, "start": resume.digest(student),
        "teacher": resume.digest(teacher), "text": resume.digest(text_encoder),
        "data": resume.digest(latents, ids),
    }  # fmt: skip
    checkpoint = Checkpoint(
        work / "distil.pt",
        settings,
        student=student,
        average=average,
        optimizer=optimizer,
        schedule=schedule,
    )
    log = TrainingLog(work / LOG_NAME, start := checkpoint.restore())
    student.train()
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        x_t = scheduler.add_noise(latents[rows].float(), noise, t)
        with torch.no_grad(), fast_autocast():
            context = text_encoder(ids[rows]).last_hidden_state
            wanted = teacher(x_t, t, context)
        with fast_autocast():
            eps = student(x_t, t, context).sample
        loss = F.mse_loss(eps.float(), wanted.float())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(student)
        log.add(step, loss=loss, grad_norm=norm)
        checkpoint.save_when_due(step + 1, steps)
    student.load_state_dict(average.module.state_dict())
    student.eval()


class RangedTeacher(nn.Module):
    """A denoiser within a range of timesteps, and another one outside.

    Args:
        aligned: Acts at timesteps from `first` to `last`, both included.
        base: Acts at others.
    """

    def __init__(self, aligned: nn.Module, base: nn.Module, first: float, last: float) -> None:
        super().__init__()
        self.aligned, self.base = aligned, base
        self._first, self._last = first, last

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Return the noise predictions of noisy latents, as `x_t`; t is (n,)."""
        eps = torch.empty_like(x_t)
        acts = (t >= self._first) & (t <= self._last)
        for rows, network in ((acts, self.aligned), (~acts, self.base)):
            if rows.any():
                eps[rows] = network(x_t[rows], t[rows], context[rows]).sample.to(eps)
        return eps


def aligned_teacher(model: Path, adapter: str) -> tuple[Any, RangedTeacher]:
    """Load a model folder as a stock pipeline, float32, and the teacher with an adapter of it."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(model)
    aligned: Any = StableDiffusionPipeline.from_pretrained(model)
    aligned.load_lora_weights(model / adapter)
    aligned.fuse_lora()
    aligned.unload_lora_weights()
    return pipe, RangedTeacher(aligned.unet, pipe.unet, *TIMESTEPS).eval()


def main(
    work: Annotated[Path, typer.Option(help="Folder of the checkpoint and the latents.")] = Path(
        "out/second-network"
    ),
    network: Annotated[Path, typer.Option(help="Folder of the trained network.")] = Path(
        "out/second-network/network"
    ),
) -> None:
    """Distil the shipped aligned model; the same command resumes."""
    pipe, teacher = aligned_teacher(Path(resolve("msdda-fast/emoji")), ADAPTER)
    latents, ids = cache_latents(
        pipe.vae, pipe.tokenizer, Renderer(("noto", "fluentflat")), work, SCENES
    )
    torch.manual_seed(0)
    student = half_unet()
    distil(student, teacher, pipe.text_encoder, pipe.scheduler, latents, ids, work)
    student.half().save_pretrained(network)
    curve = (work / LOG_NAME).read_text()
    write_atomically(network / LOG_NAME, lambda partial: partial.write_text(curve))


if __name__ == "__main__":
    typer.run(main)

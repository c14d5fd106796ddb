# SPDX-License-Identifier: Apache-2.0
"""Align adapters of the shipped model by DPOK, to compare them with those by step-level DPO.

`python -m msdda_fast.emoji.align_dpok aesthetic` trains one; the same command resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from msdda_fast.assets import resolve
from msdda_fast.emoji.align import ALIGNMENT, PROMPTS, RANK
from msdda_fast.emoji.sampling import NUM_STEPS
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import load_reward
from msdda_fast.training import DPOKConfig, Task, add_lora, train_dpok
from msdda_fast.training.codec import decoder, encode_prompts, latent_shape


def _config(name: str, loops: int, kl_weight: float) -> DPOKConfig:
    """Return the preset for the shipped model at the adapter's own eta."""
    return DPOKConfig.shipped(
        loops=loops,
        eta=ALIGNMENT[name].eta,
        num_steps=NUM_STEPS,
        kl_weight=kl_weight,
        checkpoint_every=2,
    )


# Colourfulness is easy to raise without end: there the KL term has to hold, and the run to stop.
CONFIGS = {
    "aesthetic": _config("aesthetic", loops=40, kl_weight=0.2),
    "consistency": _config("consistency", loops=200, kl_weight=0.02),
}


def align_dpok(base: Path, name: str, work: Path) -> Path:
    """Train the adapter `name` on the model folder `base` and return its LoRA folder.

    Prompts, rank and eta are those of `align`; the reward has the name of the adapter. Resumes.
    """
    config = CONFIGS[name]
    pipe = MSDDAPipeline.from_pretrained(base, objectives={name: Objective.base(eta=config.eta)})
    task = Task(
        reward=load_reward(name),
        decode=decoder(pipe),
        prompts=PROMPTS,
        prompt_embeds=encode_prompts(pipe, PROMPTS),
        latent_shape=latent_shape(pipe),
    )
    add_lora(pipe.unet, rank=RANK)
    folder = work / f"dpok-{name}"
    train_dpok(pipe.unet, pipe.scheduler, task, config, folder, weight_dtype=torch.float16)
    return folder


def main(
    name: Annotated[str, typer.Argument(help="Adapter to train: aesthetic or consistency.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("emoji_work"),
) -> None:
    """Train one adapter by DPOK; the same command resumes."""
    if name not in CONFIGS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(CONFIGS)}")
    align_dpok(resolve("msdda-fast/emoji"), name, work)


if __name__ == "__main__":
    typer.run(main)

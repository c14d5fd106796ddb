# SPDX-License-Identifier: Apache-2.0
"""Train the adapters of the flow model: `python -m msdda_fast.emoji.align_flow`.

Each raises one reward through its gradient, under Flow-GRPO's SDE at a noise level of its own.
Resumes from checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from msdda_fast.emoji.flow_model import shorten
from msdda_fast.emoji.prompts import alignment_prompts
from msdda_fast.levels import FlowSDE, noise_to_json
from msdda_fast.rewards import Reward, load_reward
from msdda_fast.steps.flow import flow_grid
from msdda_fast.steps.flow_sde import FlowSDERule
from msdda_fast.training import RewardGradientConfig, RewardTask, add_lora, train_reward_gradient
from msdda_fast.training.adapter import ATTENTION_PROJECTIONS
from msdda_fast.training.codec import soft_decoder

RANK = 16
#: Of the image's tokens and of the text's.
TARGETS = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
NUM_STEPS = 25
PROMPTS = alignment_prompts(120)
# An adapter has the name of its reward. Objects and colours are settled by t = 0.3. Each has a seed
# of its own, so that factors do not start from equal ones.
TIMESTEPS = (300.0, 1000.0)
FLOW_ALIGNMENT = {
    "aesthetic": RewardGradientConfig(
        steps=50, level=0.7, kl_weight=0.1, timesteps=TIMESTEPS, seed=2
    ),
    "consistency": RewardGradientConfig(
        steps=200, level=0.5, kl_weight=0.02, timesteps=TIMESTEPS, seed=1
    ),
}


def flow_objectives() -> dict[str, Any]:
    """Return the objectives as in `objectives.json`, each with the noise it was trained with."""
    return {
        name: {
            "source": name,
            "noise": noise_to_json(FlowSDE(recipe.level)),
            "timesteps": recipe.timesteps,
        }
        for name, recipe in FLOW_ALIGNMENT.items()
    }


def align_flow(base: Path, name: str, work: Path, recipe: RewardGradientConfig) -> Path:
    """Train the adapter for the reward `name` on the flow model `base`; return its LoRA folder.

    Resumes from the checkpoint in `work/align-NAME`, which receives log and weights (fp16).
    """
    return align_flow_to(base, load_reward(name), work / f"align-{name}", recipe)


def align_flow_to(base: Path, reward: Reward, out_dir: Path, recipe: RewardGradientConfig) -> Path:
    """Train an adapter for any differentiable reward in `out_dir`, and return it; resumes."""
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(base)
    short = shorten(pipe)
    pipe.scheduler.set_timesteps(NUM_STEPS)
    task = RewardTask(
        reward=reward,
        decode=soft_decoder(pipe),
        prompts=PROMPTS,
        conditions=conditions(pipe, PROMPTS, short),
        latent_shape=(pipe.transformer.config.in_channels, *2 * (pipe.default_sample_size,)),
    )
    add_lora(pipe.transformer, rank=RANK, target_modules=TARGETS, seed=recipe.seed)
    train_reward_gradient(
        pipe.transformer,
        FlowSDERule(flow_grid(pipe.scheduler)),
        task,
        recipe,
        out_dir,
        weight_dtype=torch.float16,
    )
    return out_dir


@torch.no_grad()
def conditions(
    pipe: Any,  # noqa: ANN401 - a StableDiffusion3Pipeline
    prompts: tuple[str, ...],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Return what the network takes beside state and time, with a row per prompt."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, do_classifier_free_guidance=False, **options
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def main(
    work: Annotated[Path, typer.Option(help="Folder of train_flow.")] = Path("out/flow"),
) -> None:
    """Train both adapters on `WORK/base`; the same command resumes."""
    for name, recipe in FLOW_ALIGNMENT.items():
        align_flow(work / "base", name, work, recipe)


if __name__ == "__main__":
    typer.run(main)

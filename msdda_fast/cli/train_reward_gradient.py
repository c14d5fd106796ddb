# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast train reward-gradient`: raise a differentiable reward through its gradient."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from msdda_fast.cli import values as parse
from msdda_fast.cli.policy import base, training_prompts
from msdda_fast.cli.session import SHIPPED, DeviceOption, ModelOption, err, reported
from msdda_fast.cli.train_options import (
    CheckpointingOption,
    EtaOption,
    OutOption,
    PromptsOption,
    RankOption,
    SeedOption,
    announce,
    finish,
)


def reward_gradient(
    reward: Annotated[str, typer.Option("--reward", help="Name of the reward to raise.")],
    folder: OutOption,
    model: ModelOption = SHIPPED,
    eta: EtaOption = 1.0,
    prompts: PromptsOption = None,
    steps: Annotated[int, typer.Option(help="Total optimiser steps; more continue a run.")] = 100,
    denoising_steps: Annotated[int, typer.Option(min=1, help="Denoising steps T.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 means none.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    kl_weight: Annotated[
        float, typer.Option(help="lambda >= 0: what a nat of KL to the base costs, in reward.")
    ] = 0.05,
    batch_size: Annotated[int, typer.Option(help="Trajectories per step.")] = 16,
    scored_steps: Annotated[
        int, typer.Option(help="Denoising steps of each that reward and gradient see.")
    ] = 3,
    timesteps: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Lowest and highest timestep at which the adapter acts; the base does outside.",
            show_default="all",
        ),
    ] = None,
    mixed_precision: Annotated[
        str, typer.Option(help="Mixed precision of the network.", metavar="no|bf16")
    ] = "no",
    rank: RankOption = 4,
    seed: SeedOption = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    gradient_checkpointing: CheckpointingOption = False,
    device: DeviceOption = None,
) -> None:
    """Raise a differentiable reward through its gradient, at a price per nat of KL to the base.

    [dim]msdda-fast train reward-gradient --reward consistency --eta 0.8 --out out/consistency[/dim]

    The folder gets a log, live curves and checkpoints; after Ctrl-C the same command continues.
    """
    with reported(f"checkpoints are in {folder}; run the same command again to continue"):
        from msdda_fast.rewards import load_reward
        from msdda_fast.steps.ddim import DDIMRule, ddim_grid
        from msdda_fast.training import (
            RewardGradientConfig,
            RewardTask,
            add_lora,
            train_reward_gradient,
        )
        from msdda_fast.training.codec import encode_prompts, latent_shape, soft_decoder

        precision: Any = mixed_precision  # checked by the configuration
        config = RewardGradientConfig(
            steps=steps, level=eta, kl_weight=kl_weight, timesteps=timesteps, lr=lr,
            guidance_scale=guidance, batch_size=batch_size, scored_steps=scored_steps,
            mixed_precision=precision, seed=parse.seed(seed), checkpoint_every=checkpoint_every,
        )  # fmt: skip
        texts = training_prompts(prompts, model)
        judge = load_reward(reward)
        pipe = base(model, eta, device, folder, texts)
        if gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        task = RewardTask(
            reward=judge,
            decode=soft_decoder(pipe),
            prompts=texts,
            conditions={"encoder_hidden_states": encode_prompts(pipe, texts)},
            latent_shape=latent_shape(pipe),
            null_conditions={"encoder_hidden_states": encode_prompts(pipe, [""])[0]},
        )
        rule = DDIMRule(ddim_grid(pipe.scheduler, denoising_steps))
        add_lora(pipe.unet, rank=rank, seed=seed)
        announce(f"{reward} by its gradient, {len(texts)} prompts, eta {eta:g}", folder)
        file = train_reward_gradient(
            pipe.unet, rule, task, config, folder, progress=not err.quiet
        )  # fmt: skip
        finish(file, reward, eta)

# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast train`: train an adapter for one objective, from a reward or from preferences."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from msdda_fast.cli import values as parse
from msdda_fast.cli.policy import base, ranked, training_prompts
from msdda_fast.cli.session import SHIPPED, DeviceOption, ModelOption, err, reported
from msdda_fast.cli.train_options import (
    PRESET,
    CheckpointingOption,
    EtaOption,
    OutOption,
    PromptsOption,
    RankOption,
    SeedOption,
    announce,
    finish,
)
from msdda_fast.cli.train_reward_gradient import reward_gradient

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train an adapter for one objective: a LoRA folder that diffusers and peft can load.",
)


class Preset(StrEnum):
    """The defaults of the options that are not given."""

    paper = "paper"
    shipped = "shipped"


class KL(StrEnum):
    """The form of DPOK's KL term."""

    eps = "eps"
    exact = "exact"


class Advantage(StrEnum):
    """The baseline that a reward is compared with."""

    value = "value"
    prompt = "prompt"


@app.command()
def dpok(
    reward: Annotated[str, typer.Option("--reward", help="Name of the reward to raise.")],
    folder: OutOption,
    model: ModelOption = SHIPPED,
    eta: EtaOption = 1.0,
    prompts: PromptsOption = None,
    loops: Annotated[int, typer.Option(help="Total rollouts; more continue a run.")] = 100,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="Defaults for Stable Diffusion (paper), or for small models (shipped).",
            show_default="shipped for the shipped model, else paper",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps T.", show_default=PRESET)
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Guidance scale; 1 means none.", show_default=PRESET),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default=PRESET)] = None,
    kl_weight: Annotated[
        float | None, typer.Option(help="Weight of the KL term, >= 0.", show_default=PRESET)
    ] = None,
    kl: Annotated[
        KL | None,
        typer.Option(help="KL term as published, or the exact divergence.", show_default=PRESET),
    ] = None,
    advantage: Annotated[
        Advantage | None,
        typer.Option(
            help="Reward minus a value network, or minus its prompt's mean.", show_default=PRESET
        ),
    ] = None,
    prompts_per_loop: Annotated[
        int | None, typer.Option(help="Different prompts per rollout.", show_default=PRESET)
    ] = None,
    samples_per_prompt: Annotated[
        int | None, typer.Option(help="Trajectories per prompt.", show_default=PRESET)
    ] = None,
    policy_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps per loop.", show_default=PRESET)
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            help="Mixed precision of the network.", metavar="no|bf16", show_default=PRESET
        ),
    ] = None,
    rank: RankOption = 4,
    seed: SeedOption = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Loops between checkpoints.")] = 10,
    gradient_checkpointing: CheckpointingOption = False,
    device: DeviceOption = None,
) -> None:
    """Raise a reward by policy gradient (DPOK), as the paper's models were aligned.

    [dim]msdda-fast train dpok --reward aesthetic --eta 1.0 --out out/aesthetic[/dim]

    The folder gets a log, live curves and checkpoints; after Ctrl-C the same command continues.
    """
    with reported(f"checkpoints are in {folder}; run the same command again to continue"):
        from accelerate import Accelerator  # type: ignore[import-untyped]

        from msdda_fast.rewards import load_reward
        from msdda_fast.training import DPOKConfig, Task, add_lora, train_dpok
        from msdda_fast.training.codec import decoder, encode_prompts, latent_shape

        given: dict[str, Any] = {
            "num_steps": steps, "guidance_scale": guidance, "lr": lr, "kl_weight": kl_weight,
            "kl": kl and kl.value, "advantage": advantage and advantage.value,
            "prompts_per_loop": prompts_per_loop, "samples_per_prompt": samples_per_prompt,
            "mixed_precision": mixed_precision, "policy_steps": policy_steps,
        }  # fmt: skip
        chosen = {name: value for name, value in given.items() if value is not None}
        chosen |= {
            "loops": loops, "eta": eta, "seed": parse.seed(seed),
            "checkpoint_every": checkpoint_every,
        }  # fmt: skip
        small = preset is Preset.shipped or (preset is None and model == SHIPPED)
        config = DPOKConfig.shipped(**chosen) if small else DPOKConfig(**chosen)
        texts = training_prompts(prompts, model)
        judge = load_reward(reward)
        pipe = base(model, eta, device, folder, texts)
        if gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        task = Task(
            reward=judge,
            decode=decoder(pipe),
            prompts=texts,
            prompt_embeds=encode_prompts(pipe, texts),
            latent_shape=latent_shape(pipe),
            null_embeds=encode_prompts(pipe, [""])[0],
        )
        add_lora(pipe.unet, rank=rank, seed=seed)
        accelerator = Accelerator(
            cpu=pipe.device.type == "cpu",
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation_steps,
        )
        announce(f"{reward} by DPOK, {len(texts)} prompts, eta {eta:g}", folder)
        file = train_dpok(
            pipe.unet, pipe.scheduler, task, config, folder,
            accelerator=accelerator, progress=not err.quiet,
        )  # fmt: skip
        finish(file, reward, eta)


@app.command("step-dpo")
def step_dpo(
    folder: OutOption,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Rank the model's own samples by this reward.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --reward: folder of images, with pairs.jsonl or pairs.csv "
            "(prompt, chosen, rejected)."
        ),
    ] = None,
    model: ModelOption = SHIPPED,
    eta: EtaOption = 1.0,
    prompts: PromptsOption = None,
    seeds_per_prompt: Annotated[
        int, typer.Option(min=2, help="Samples to rank per prompt, with --reward.")
    ] = 12,
    denoising_steps: Annotated[int, typer.Option(min=1, help="Steps T, with --reward.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale, with --reward.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Total optimiser steps; more continue a run.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Pairs per step.")] = 16,
    beta: Annotated[float, typer.Option(help="beta, in Diffusion-DPO's convention.")] = 2000.0,
    gamma: Annotated[float, typer.Option(help="1 is the paper's loss, 0 Diffusion-DPO.")] = 1.0,
    min_timestep: Annotated[int, typer.Option(help="Smallest timestep to learn from.")] = 0,
    rank: RankOption = 4,
    seed: SeedOption = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    device: DeviceOption = None,
) -> None:
    """Learn a preference from pairs of images (step-level DPO, Eq. 4 of the paper).

    [dim]msdda-fast train step-dpo --pairs my/pairs --out out/mine[/dim]

    [dim]msdda-fast train step-dpo --reward aesthetic --out out/aesthetic[/dim]
    """
    with reported(f"checkpoints are in {folder}; run the same command again to continue"):
        from msdda_fast.training import (
            StepDPOConfig,
            add_lora,
            encode_pairs,
            read_pairs,
            train_step_dpo,
        )
        from msdda_fast.training.codec import codec_id, encode_prompts, encoder, image_size

        if (reward is None) == (pairs is None):
            raise ValueError("give either --reward or --pairs")
        if pairs is not None and prompts is not None:
            raise ValueError("--prompts goes with --reward; --pairs has its own prompts")
        config = StepDPOConfig(
            steps=steps, lr=lr, batch_size=batch_size, beta_dpo=beta, gamma=gamma, eta=eta,
            min_timestep=min_timestep, seed=parse.seed(seed), checkpoint_every=checkpoint_every,
        )  # fmt: skip
        shown = not err.quiet
        if pairs is not None:
            rows = read_pairs(pairs)
            pipe = base(model, eta, device, folder, [row.prompt for row in rows])
            data, texts = encode_pairs(
                rows, encoder(pipe), image_size(pipe), codec_id(pipe),
                folder / "latents.safetensors", progress=shown,
            )  # fmt: skip
        else:
            assert reward is not None  # one of the two is given
            texts = training_prompts(prompts, model)
            pipe, data = ranked(
                model, eta, device, reward, texts, seeds_per_prompt, denoising_steps, guidance,
                folder, shown,
            )  # fmt: skip
        embeds = encode_prompts(pipe, texts)
        add_lora(pipe.unet, rank=rank, seed=seed)
        announce(f"step-level DPO, {len(data)} pairs of {len(texts)} prompts", folder)
        file = train_step_dpo(
            pipe.unet, pipe.scheduler, data, embeds, config, folder, progress=shown
        )
        finish(file, reward or "mine", eta)


app.command("reward-gradient")(reward_gradient)

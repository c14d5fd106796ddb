# SPDX-License-Identifier: Apache-2.0
"""What `msdda-fast train` starts from: the base model, prompts, and ranked samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdda_fast.cli import values as parse
from msdda_fast.cli.session import (
    SHIPPED,
    DType,
    check_prompts,
    check_request,
    load,
    only_stable_diffusion,
)

if TYPE_CHECKING:
    from msdda_fast.pipelines import MSDDAPipeline


def base(
    model: str, eta: float, device: str | None, folder: Path, prompts: list[str]
) -> MSDDAPipeline:
    """Load the model without its adapters, in float32, for these prompts and this folder."""
    from msdda_fast.files import check_folder

    check_folder(folder)
    only_stable_diffusion(model, "train")
    pipe: MSDDAPipeline = load(model, [f"policy=base:{eta}"], DType.float32, device)
    check_prompts(pipe, prompts)
    return pipe


def training_prompts(file: Path | None, model: str) -> list[str]:
    """Return the prompts of a file, or the shipped model's own; other models have none."""
    if file is not None:
        return parse.prompts(file)
    if model != SHIPPED:
        raise ValueError(f"--prompts is needed for {model}: a file with one prompt per line")
    from msdda_fast.emoji.prompts import alignment_prompts

    return list(alignment_prompts(120))


def ranked(
    model: str, eta: float, device: str | None, reward: str, texts: list[str], seeds: int,
    num_steps: int, guidance_scale: float, folder: Path, shown: bool,
) -> tuple[MSDDAPipeline, Any]:  # fmt: skip
    """Return the base model, and pairs of its own samples, ranked by a reward."""
    from msdda_fast.rewards import load_reward
    from msdda_fast.training import collect, preference_pairs
    from msdda_fast.training.codec import sample_fn

    judge = load_reward(reward)
    pipe = base(model, eta, device, folder, texts)
    check_request(pipe, texts, num_steps, guidance_scale)
    samples = collect(
        sample_fn(pipe, num_steps=num_steps, guidance_scale=guidance_scale),
        {reward: judge}, texts, range(seeds), folder / "samples", progress=shown,
    )  # fmt: skip
    ranked = preference_pairs(samples.latents, samples.scores[reward], samples.prompt_index)
    return pipe, ranked

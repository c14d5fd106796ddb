# SPDX-License-Identifier: Apache-2.0
"""Measure the shipped flow model on held-out prompts: `python -m msdda_fast.emoji.evaluate_flow`.

The guidance of the base is chosen on the training prompts; then all arms draw 25 test prompts x 4
seeds (resumable) and `benchmarks/results/emoji_flow.json` gets means with intervals,
`emoji_flow_samples.csv` a row per image. As in `emoji.evaluate`, the judge was never optimised
against.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from msdda_fast.assets import resolve
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT, NUM_STEPS
from msdda_fast.emoji.evaluate import summarise, to_csv
from msdda_fast.emoji.export_flow import FLOW
from msdda_fast.emoji.flow_model import shorten
from msdda_fast.emoji.prompts import TEST_PROMPTS, TRAIN_PROMPTS
from msdda_fast.emoji.sampling import decode
from msdda_fast.files import write_atomically
from msdda_fast.levels import FlowSDE, noise_to_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.resume import digest
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.rewards.judge import Judge
from msdda_fast.training.collect import Collection, Sampler, collect

SEEDS = range(4)
CHOICE_SEEDS = range(20_000, 20_002)
GUIDANCE = (2.0, 3.0, 4.0)  # of the base, to choose from
SWEEP = (0.0, 0.5, 1.0)  # weight of consistency
BATCH = 25


@dataclass(frozen=True, slots=True)
class FlowArm:
    """One row of the table."""

    name: str
    weights: Mapping[str, float]
    objectives: Mapping[str, Objective] | None = None  # None: the model's own
    guidance_scale: float = 1.0  # that of the adapters' training


def base_arm(guidance_scale: float) -> FlowArm:
    """Return the base as stock draws it: the ODE's steps, with guidance."""
    name = f"base, Euler, guidance {guidance_scale:g}"
    return FlowArm(name, {"base": 1.0}, {"base": Objective.base()}, guidance_scale)


def flow_arms(guidance_scale: float) -> list[FlowArm]:
    """Return the base with guidance, the base at both noise levels, and the sweep."""
    noisy = [
        FlowArm(_noisy(a), {"base": 1.0}, {"base": Objective(noise=FlowSDE(a))})
        for a in (FLOW_ALIGNMENT[name].level for name in ("aesthetic", "consistency"))
    ]
    sweep = [FlowArm(f"w = {w:g}", {"aesthetic": 1 - w, "consistency": w}) for w in SWEEP]
    return [base_arm(guidance_scale), *noisy, *sweep]


def _noisy(level: float) -> str:
    return f"base, a = {level:g}"


def pairs_of_arms() -> list[tuple[str, str]]:
    """Return the neighbours in the sweep, and each end with its own base."""
    names = [f"w = {w:g}" for w in SWEEP]
    ends = zip(("aesthetic", "consistency"), (names[0], names[-1]), strict=True)
    return [
        *pairwise(names),
        *((_noisy(FLOW_ALIGNMENT[name].level), end) for name, end in ends),
    ]


def sample_flow_arm(
    model: Path, arm: FlowArm, work: Path, prompts: Sequence[str], seeds: range
) -> Collection:
    """Draw one arm in float32 and score it; resumes from finished shards."""
    rewards: dict[str, Any] = {name: load_reward(name) for name in REWARDS}
    rewards |= {f"judge {what}": Judge(what) for what in ("object", "color")}
    folder = work / arm.name.replace(" ", "").replace(",", "-")
    return collect(
        flow_sampler(load_arm(model, arm), arm), rewards, prompts, seeds, folder, batch_size=BATCH
    )


def load_arm(model: Path, arm: FlowArm) -> Any:  # noqa: ANN401 - Stable Diffusion 3, attached
    """Load the flow model in float32 with the objectives of an arm."""
    pipe: Any = MSDDAPipeline.from_pretrained(model, objectives=arm.objectives)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_sampler(pipe: Any, arm: FlowArm, **more: object) -> Sampler:  # noqa: ANN401 - as above
    """Return a function (prompts, seeds) -> (latents, images); `more` are options of the call."""
    options = {
        "num_inference_steps": NUM_STEPS, "guidance_scale": arm.guidance_scale, **more
    }  # fmt: skip
    short = shorten(pipe)

    def sample(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        latents = pipe(
            list(prompts), weights=dict(arm.weights), seed=list(seeds), output_type="latent",
            **options, **short,
        ).images  # fmt: skip
        return latents, decode(pipe, latents)

    settings = {
        **options,
        "weights": dict(arm.weights),
        "objectives": {
            name: {"noise": one.noise and noise_to_json(one.noise), "timesteps": one.timesteps}
            for name, one in pipe.objectives.items()
        },
        "network": digest(pipe.transformer),  # with its adapters
        "autoencoder": digest(pipe.vae),
    }
    return Sampler(sample, json.loads(json.dumps(settings)))


def choose_guidance(model: Path, work: Path) -> dict[float, float]:
    """Return for each guidance the share of objects that the judge finds, on training prompts."""
    return {
        scale: sample_flow_arm(model, base_arm(scale), work, TRAIN_PROMPTS, CHOICE_SEEDS)
        .scores["judge object"]
        .mean()
        .item()
        for scale in GUIDANCE
    }


def main(
    work: Annotated[Path, typer.Option(help="Folder of the resumable samples.")] = Path(
        "out/emoji-flow"
    ),
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path(
        "benchmarks/results"
    ),
    model: Annotated[
        Path | None, typer.Option(help="Model folder.", show_default="the shipped model")
    ] = None,
) -> None:
    """Choose the guidance, draw all arms on the test prompts, and write the result files."""
    folder = model or resolve(FLOW)
    found = choose_guidance(folder, work / "training-prompts")
    guidance = max(found, key=lambda scale: (found[scale], -scale))
    choice = {f"{scale:g}": round(objects, 4) for scale, objects in found.items()}
    samples = {
        arm.name: sample_flow_arm(folder, arm, work / "test-prompts", TEST_PROMPTS, SEEDS)
        for arm in flow_arms(guidance)
    }
    setting = {
        "prompts": len(TEST_PROMPTS), "seeds": len(SEEDS), "steps": NUM_STEPS,
        "guidance_scale": guidance, "objects on training prompts by guidance": choice,
        "dtype": "float32", "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "intervals": "95% bootstrap over seeds within prompts",
    }  # fmt: skip
    summary = {"setting": setting, **summarise(samples, pairs_of_arms())}
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(results / "emoji_flow.json", lambda partial: partial.write_text(text))
    table = to_csv(samples)
    write_atomically(results / "emoji_flow_samples.csv", lambda partial: partial.write_text(table))
    for arm, figures in summary["arms"].items():
        print(arm, {k: v["mean"] for k, v in figures.items()})


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Measure the shipped model on held-out prompts: both rewards, and a judge nothing was trained on.

`python -m msdda_fast.emoji.evaluate` samples 25 test prompts x 32 seeds per arm (resumable) and
writes `benchmarks/results/emoji.json` (means with intervals) and `emoji_samples.csv` (per image).
With `--three` it measures the third adapter, on fewer seeds: `emoji_three.json` and its samples.
"""

from __future__ import annotations

import csv
import io
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
from msdda_fast.emoji.align import ALIGNMENT
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.emoji.sampling import DTYPE, GUIDANCE_SCALE, NUM_STEPS, sampler, score
from msdda_fast.files import write_atomically
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.rewards.grammar import parse
from msdda_fast.rewards.judge import Judge
from msdda_fast.training import Collection, collect

SEEDS = range(32)
SWEEP = (0.0, 0.2, 0.5, 0.8, 1.0)  # weight of consistency
THREE_SEEDS = range(8)  # the first of SEEDS
THIRD = "warmth"
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Arm:
    """One column of the table: a preference, or the base model at an adapter's eta."""

    name: str
    weights: Mapping[str, float]
    objectives: Mapping[str, Objective] | None = None  # None: the model's own


def arms() -> list[Arm]:
    """Return the base model at both etas, and the sweep from aesthetic to consistency."""
    base = [
        Arm(f"base, eta {eta}", {"base": 1.0}, {"base": Objective.base(eta=eta)})
        for eta in (1.0, 0.8)
    ]
    sweep = [Arm(f"w = {w:g}", {"aesthetic": 1 - w, "consistency": w}) for w in SWEEP]
    return base + sweep


def three_arms() -> list[Arm]:
    """Return the base model, each of the three adapters alone, and all three in equal parts."""
    emoji = "msdda-fast/emoji"
    own = {
        name: Objective(emoji, subfolder=name, eta=recipe.eta, timesteps=recipe.config.timesteps)
        for name, recipe in ALIGNMENT.items()
    }
    third = 1 / len(own)
    by_name = {arm.name: arm for arm in arms()}
    return [
        *(by_name[name] for name in ("base, eta 1.0", "w = 0", "w = 1")),
        Arm(THIRD, {THIRD: 1.0}, {THIRD: own[THIRD]}),
        Arm("a third each", dict.fromkeys(own, third), own),
    ]


def sample_arm(model: Path, arm: Arm, work: Path, seeds: range = SEEDS) -> Collection:
    """Sample one arm on the test prompts and score it; resumes from finished shards."""
    pipe = MSDDAPipeline.from_pretrained(model, objectives=arm.objectives, dtype=DTYPE)
    rewards: dict[str, Any] = {name: load_reward(name) for name in REWARDS}
    rewards |= {f"judge {what}": Judge(what) for what in ("object", "color")}
    folder = work / arm.name.replace(" ", "").replace(",", "-")
    return collect(sampler(pipe, arm.weights), rewards, TEST_PROMPTS, seeds, folder, batch_size=32)


def sample_three(model: Path, work: Path) -> dict[str, Collection]:
    """Sample the arms of the third adapter, sharing those of `arms`, and add its reward."""
    pipe = MSDDAPipeline.from_pretrained(model)
    shared, samples = {arm.name for arm in arms()}, {}
    for arm in three_arms():
        done = sample_arm(model, arm, work, SEEDS if arm.name in shared else THREE_SEEDS)
        kept = (done.seeds >= THREE_SEEDS.start) & (done.seeds < THREE_SEEDS.stop)
        scores = {name: values[kept] for name, values in done.scores.items()}
        few = Collection(done.latents[kept], done.prompt_index[kept], done.seeds[kept], scores)
        scores[THIRD] = score(pipe, few, TEST_PROMPTS, THIRD)
        samples[arm.name] = few
    return samples


def interval(values: Tensor) -> dict[str, float]:
    """Return the mean of values, (P, S), with its 95% bootstrap interval over seeds per prompt."""
    prompts, seeds = values.shape
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(seeds, (RESAMPLES, prompts, seeds), generator=generator)
    means = values.expand(RESAMPLES, -1, -1).gather(2, draws).mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    figures = {"mean": values.mean().item(), "low": low, "high": high}
    return {name: round(value, 4) for name, value in figures.items()}


def pairs_of_arms() -> list[tuple[str, str]]:
    """Return the neighbours in the sweep, and each end with its own base."""
    names = [f"w = {w:g}" for w in SWEEP]
    return [*pairwise(names), ("base, eta 1.0", names[0]), ("base, eta 0.8", names[-1])]


def summarise(
    samples: Mapping[str, Collection], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return means with intervals of the scored samples of all arms; differences are paired.

    Args:
        samples: By arm, with equal prompts and seeds.
        pairs: The differences to take: (before, after).
    """
    shape = len(TEST_PROMPTS), -1
    grid = {arm: {k: v.view(shape) for k, v in c.scores.items()} for arm, c in samples.items()}
    single = torch.tensor([len(parse(prompt)) == 1 for prompt in TEST_PROMPTS])
    table = {
        arm: {k: interval(v) for k, v in scores.items()}
        | {f"{k}, single-object prompts": interval(v[single]) for k, v in scores.items()}
        for arm, scores in grid.items()
    }
    paired = {
        f"{after} minus {before}": {
            k: interval(grid[after][k] - grid[before][k]) for k in grid[after]
        }
        for before, after in pairs
    }
    return {"arms": table, "paired differences": paired}


def to_csv(samples: Mapping[str, Collection]) -> str:
    """Return CSV text with one row per image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(next(iter(samples.values())).scores)
    writer.writerow(["arm", "prompt", "seed", *names])
    for arm, c in samples.items():
        columns = [c.scores[name].tolist() for name in names]
        rows = zip(c.prompt_index.tolist(), c.seeds.tolist(), *columns, strict=True)
        for prompt, seed, *values in rows:
            writer.writerow([arm, TEST_PROMPTS[prompt], seed, *(f"{v:.4f}" for v in values)])
    return text.getvalue()


def main(
    work: Annotated[Path, typer.Option(help="Folder of the resumable samples.")] = Path(
        "out/emoji"
    ),
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path(
        "benchmarks/results"
    ),
    model: Annotated[
        Path | None, typer.Option(help="Model folder.", show_default="the shipped model")
    ] = None,
    three: Annotated[bool, typer.Option(help="Measure the third adapter instead.")] = False,
) -> None:
    """Sample all arms on the test prompts and write the result files."""
    folder = model or resolve("msdda-fast/emoji")
    if three:
        samples, name, seeds = sample_three(folder, work), "emoji_three", THREE_SEEDS
        pairs = [("base, eta 1.0", arm) for arm in samples if arm != "base, eta 1.0"]
    else:
        samples = {arm.name: sample_arm(folder, arm, work) for arm in arms()}
        name, seeds, pairs = "emoji", SEEDS, pairs_of_arms()
    setting = {
        "prompts": len(TEST_PROMPTS), "seeds": len(seeds), "steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE, "dtype": str(DTYPE).removeprefix("torch."),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "intervals": "95% bootstrap over seeds within prompts",
    }  # fmt: skip
    summary = json.dumps({"setting": setting, **summarise(samples, pairs)}, indent=1) + "\n"
    write_atomically(results / f"{name}.json", lambda partial: partial.write_text(summary))
    table = to_csv(samples)
    write_atomically(results / f"{name}_samples.csv", lambda partial: partial.write_text(table))
    for arm, figures in json.loads(summary)["arms"].items():
        print(arm, {k: v["mean"] for k, v in figures.items()})


if __name__ == "__main__":
    typer.run(main)

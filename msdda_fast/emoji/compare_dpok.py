# SPDX-License-Identifier: Apache-2.0
"""Compare adapters trained by DPOK with those by step-level DPO, on the held-out prompts.

`python -m msdda_fast.emoji.compare_dpok aesthetic=FOLDER consistency=FOLDER` samples each folder
at its own eta on the 25 test prompts (resumable) and writes `benchmarks/results/dpok.json`. The
base model and the adapters by step-level DPO, which shipped once, were sampled with the same seeds:
their rows are read from `emoji_step_dpo_samples.csv`, and every difference is paired by prompt and
seed.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from msdda_fast.assets import resolve
from msdda_fast.emoji.align import ALIGNMENT
from msdda_fast.emoji.evaluate import interval
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.emoji.sampling import NUM_STEPS, sampler
from msdda_fast.files import write_atomically
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.resume import require_same
from msdda_fast.rewards import load_reward
from msdda_fast.rewards.judge import Judge
from msdda_fast.training import collect

Scores = dict[str, Tensor]  # by metric, (prompts, seeds)
DTYPE = torch.bfloat16  # as of the samples that they are compared with
REWARDS = ("aesthetic", "consistency")
STEP_DPO_ARM = {"aesthetic": "w = 0", "consistency": "w = 1"}  # of the samples


def measured(samples: Path, arm: str, seeds: int) -> Scores:
    """Return the scores of one arm of the samples for the first seeds.

    Raises:
        ValueError: The file has no such arm, other prompts or fewer seeds.
    """
    with samples.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == arm]
    kept = {(row["prompt"], int(row["seed"])): row for row in rows if int(row["seed"]) < seeds}
    wanted = [(prompt, seed) for prompt in TEST_PROMPTS for seed in range(seeds)]
    if missing := [key for key in wanted if key not in kept]:
        raise ValueError(f"{samples} has no row for arm {arm!r}, prompt and seed {missing[0]}")
    names = [name for name in rows[0] if name not in ("arm", "prompt", "seed")]
    return {
        name: torch.tensor([float(kept[key][name]) for key in wanted]).view(-1, seeds)
        for name in names
    }


def sample(name: str, folder: Path, seeds: int, work: Path) -> Scores:
    """Sample the adapter in `folder` at the eta of objective `name`; resumes."""
    objective = Objective(folder, eta=ALIGNMENT[name].eta)
    pipe = MSDDAPipeline.from_pretrained(
        resolve("msdda-fast/emoji"), objectives={name: objective}, dtype=DTYPE
    )
    rewards: dict[str, Any] = {reward: load_reward(reward) for reward in REWARDS}
    rewards |= {f"judge {what}": Judge(what) for what in ("object", "color")}
    weights = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    out = work / f"{name}-{hashlib.sha256(weights).hexdigest()[:12]}"
    found = collect(
        sampler(pipe, {name: 1.0}), rewards, TEST_PROMPTS, range(seeds), out, batch_size=40
    )
    return {key: values.view(-1, seeds) for key, values in found.scores.items()}


def compare(name: str, folder: Path, seeds: int, samples: Path, work: Path) -> dict[str, Any]:
    """Return one adapter's means, gains over the base model, and DPOK minus step-level DPO."""
    arms = {
        "base": measured(samples, f"base, eta {ALIGNMENT[name].eta}", seeds),
        "step-dpo": measured(samples, STEP_DPO_ARM[name], seeds),
        "dpok": sample(name, folder, seeds, work),
    }

    def less(one: str, other: str) -> dict[str, Any]:
        return {key: interval(arms[one][key] - arms[other][key]) for key in arms["base"]}

    difference = less("dpok", "step-dpo")
    return {
        "adapter": folder.as_posix(),
        "eta": ALIGNMENT[name].eta,
        "seeds": seeds,
        "means": {arm: {k: interval(v) for k, v in scores.items()} for arm, scores in arms.items()},
        "gain": {arm: less(arm, "base") for arm in ("step-dpo", "dpok")},
        "dpok minus step-dpo": difference,
        "verdict": verdict(difference, name),
    }


def verdict(difference: dict[str, Any], name: str) -> str:
    """Return which method the intervals favour, given both rewards."""
    signs = {
        reward: (difference[reward]["low"] > 0) - (difference[reward]["high"] < 0)
        for reward in REWARDS
    }
    (other,) = set(REWARDS) - {name}
    if signs[name] * signs[other] < 0:
        return f"neither: {'dpok' if signs[name] > 0 else 'step-dpo'} has more {name}, less {other}"
    total = signs[name] + signs[other]
    return "no difference" if total == 0 else "dpok" if total > 0 else "step-dpo"


def main(
    adapters: Annotated[
        list[str], typer.Argument(metavar="NAME=FOLDER...", help="Adapters trained by DPOK.")
    ],
    seeds: Annotated[int, typer.Option(min=2, help="Number of seeds per prompt.")] = 8,
    work: Annotated[Path, typer.Option(help="Folder of the resumable samples.")] = Path("out/dpok"),
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Compare the given adapters with those by step-level DPO and write `dpok.json`."""
    folders = dict(text.split("=", 1) for text in adapters if "=" in text)
    if len(folders) != len(adapters) or not set(folders) <= set(REWARDS):
        raise typer.BadParameter(f"must be NAME=FOLDER, with NAME one of {', '.join(REWARDS)}")
    setting = {
        "prompts": len(TEST_PROMPTS), "steps": NUM_STEPS,
        "dtype": str(DTYPE).removeprefix("torch."), "torch": torch.__version__,
        "intervals": "95% bootstrap over seeds within prompts; differences are paired",
    }  # fmt: skip
    target, found = results / "dpok.json", {}
    if target.is_file():
        stored = json.loads(target.read_text())
        require_same(target, stored["setting"], setting)
        found = stored["adapters"]
    for name, folder in folders.items():
        found[name] = compare(
            name, Path(folder), seeds, results / "emoji_step_dpo_samples.csv", work
        )  # fmt: skip
    text = json.dumps({"setting": setting, "adapters": found}, indent=1) + "\n"
    write_atomically(target, lambda partial: partial.write_text(text))
    for name, figures in found.items():
        print(name, figures["verdict"], {k: v["mean"] for k, v in figures["gain"]["dpok"].items()})


if __name__ == "__main__":
    typer.run(main)

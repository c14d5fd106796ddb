# SPDX-License-Identifier: Apache-2.0
"""Compare MSDDA on the shipped flow model with merges of its adapters, DB-MPA and a MORL oracle.

    python benchmarks/compare_flow.py --work DIR   # an hour of one core; resumes

All systems are at w = 0.5 and have the noise of MSDDA there: Flow-GRPO's SDE at

    a_w = (sum_i w_i / a_i^2)^(-1/2).

A step of its rule moves by dt (1 + a^2 / 2) times the velocity, so predictions merged at

    what_i = share_i (1 + a_i^2 / 2) / (1 + a_w^2 / 2)

give the fused mean in every step but the first: `effective_weights` at a_i / sqrt(2). Merges at
these weights, and DB-MPA at them (`fusion="eps"`), are the rows "re-weighted". MORL is one adapter
trained on r_w at a_w.

With few steps Euler's noise stays in the picture. Flow-CPS takes it out in the same step: the rows
with 4 and 8 steps are MSDDA by either rule, at the same numbers for a.

Writes results/compare-flow; `benchmarks/report.py` makes the table of docs/results.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from safetensors.torch import load_file, save_file

import msdda_fast as mf
from benchmarks.harness import RESULTS
from msdda_fast.assets import resolve
from msdda_fast.emoji.align import WeightedSum
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT, NUM_STEPS, TIMESTEPS, align_flow_to
from msdda_fast.emoji.evaluate_flow import FlowArm, flow_sampler, load_arm
from msdda_fast.emoji.export_flow import FLOW
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.evaluation.floors import JUDGES
from msdda_fast.evaluation.report import write_report
from msdda_fast.evaluation.rotations import ROTATED
from msdda_fast.evaluation.scores import Score, merge_scores
from msdda_fast.evaluation.settings import write_json
from msdda_fast.files import write_atomically
from msdda_fast.lora.soup import merge_adapters
from msdda_fast.lora.stack import StackedFactors
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.training.collect import collect

WEIGHTED, OTHER, W = "consistency", "aesthetic", 0.5  # w weighs the first
ROTATIONS = 8
FEW_STEPS, RULES = (8, 4), {"SDE": mf.FlowSDE, "CPS": mf.CPS}
SCORES = (*REWARDS, *JUDGES, "background_chroma")
LORA = "pytorch_lora_weights.safetensors"
BATCH = 25


@dataclass(frozen=True)
class System:
    """One row at one preference: method and variant as in tables, and what is drawn."""

    method: str
    variant: str
    w: float | None
    arm: FlowArm
    options: Mapping[str, Any] = field(default_factory=dict)  # of the call

    @property
    def weights(self) -> str:
        """The preference as scores have it."""
        if self.w is None:
            return ""
        return f"{WEIGHTED}={self.w:g} {OTHER}={1 - self.w:g}"


def preference(w: float) -> dict[str, float]:
    """Return both weights."""
    return {WEIGHTED: w, OTHER: round(1 - w, 10)}


def remapped(w: float) -> tuple[dict[str, float], float]:
    """Return the weights at which merged predictions are MSDDA's, and a_w."""
    weights = preference(w)
    levels = torch.tensor([FLOW_ALIGNMENT[name].level for name in weights], dtype=torch.float64)
    what, rate = mf.effective_weights(list(weights.values()), levels / 2**0.5)
    return dict(zip(weights, what.tolist(), strict=True)), float(rate) * 2**0.5


def soup(
    model: Path, weights: Mapping[str, float], merge: str, rotation: int | None, target: Path
) -> Path:
    """Write the merge of the model's adapters, whose scales are 1, as a LoRA file."""
    stacks: dict[str, dict[str, StackedFactors]] = {}
    for name in weights:
        tensors = load_file(model / name / LORA)
        stacks[name] = {
            key.removesuffix(".lora_A.weight"): StackedFactors(
                down.float()[None],
                tensors[key.replace(".lora_A.", ".lora_B.")].float()[None],
            )
            for key, down in tensors.items()
            if key.endswith(".lora_A.weight")
        }
    merged = merge_adapters(stacks, list(weights.values()), merge, rotation)
    written = {f"{path}.lora_A.weight": f.down.contiguous() for path, f in merged.items()}
    written |= {f"{path}.lora_B.weight": f.up.contiguous() for path, f in merged.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda partial: save_file(written, partial))
    return target


def systems(model: Path, work: Path) -> Iterator[System]:
    """Yield what to draw, cheap systems first; MORL's adapter is trained when it is asked for."""

    def alone(source: Path | None, a: float) -> dict[str, mf.Objective]:
        timesteps = None if source is None else TIMESTEPS
        return {"one": mf.Objective(source, noise=mf.FlowSDE(a), timesteps=timesteps)}

    def merged(variant: str, weights, merge="product", rotation=None) -> System:
        file = work / "merged" / f"{variant}.safetensors".replace(" ", "-")
        source = soup(model, weights, merge, rotation, file)
        arm = FlowArm(f"RS {variant}", {"one": 1.0}, alone(source, remapped(W)[1]))
        return System("RS", variant, W, arm)

    base = FlowArm("SD", {"one": 1.0}, alone(None, remapped(W)[1]))
    yield System("SD", "", None, base)
    fused = FlowArm("MSDDA", preference(W))
    yield System("MSDDA", "", W, fused)
    yield System("DB-MPA", "re-weighted", W, replace(fused, name="DB-MPA"), {"fusion": "eps"})
    yield merged("product", preference(W))
    yield merged("re-weighted", remapped(W)[0])
    for steps in FEW_STEPS:
        for name, noise in RULES.items():
            own = {
                objective: mf.Objective(
                    FLOW, subfolder=objective, noise=noise(recipe.level), timesteps=TIMESTEPS
                )
                for objective, recipe in FLOW_ALIGNMENT.items()
            }
            variant = f"{name}, {steps} steps"
            arm = FlowArm(f"MSDDA {variant}", preference(W), own)
            yield System("MSDDA", variant, W, arm, {"num_inference_steps": steps})
    yield merged("factor", preference(W), "factor")
    for seed in range(ROTATIONS):
        yield merged(f"{ROTATED} {seed}", preference(W), "factor", seed)
    ends = [FLOW_ALIGNMENT[name] for name in preference(W)]
    a_w = remapped(W)[1]
    recipe = replace(
        ends[0],
        level=a_w,
        steps=round(sum(end.steps for end in ends) / 2),
        kl_weight=sum(end.kl_weight for end in ends) / 2,
    )
    oracle = align_flow_to(model, WeightedSum(preference(W)), work / "morl", recipe)
    yield System("MORL", "", W, FlowArm("MORL", {"one": 1.0}, alone(oracle, a_w)))


def networks(system: System, timesteps: torch.Tensor) -> int:
    """Return how many forwards an image takes: outside of the range all objectives are the base."""
    inside = int(((timesteps >= TIMESTEPS[0]) & (timesteps <= TIMESTEPS[1])).sum())
    return len(timesteps) + inside * (len(system.arm.weights) - 1)


def draw(model: Path, system: System, work: Path, seeds: range) -> Iterator[Score]:
    """Draw and score what is missing of a system, and yield the scores of all its images."""
    name = system.arm.name.replace(" ", "-").replace(",", "")
    rewards = {reward: load_reward(reward) for reward in SCORES}
    pipe = load_arm(model, system.arm)
    sampler = flow_sampler(pipe, system.arm, **system.options)
    timing, start = work / name / "seconds.json", time.perf_counter()
    found = collect(sampler, rewards, TEST_PROMPTS, seeds, work / name, batch_size=BATCH)
    if not timing.exists():
        seconds = (time.perf_counter() - start) / len(found.seeds)
        write_json(timing, {"seconds": round(seconds, 4)})
    seconds = json.loads(timing.read_text())["seconds"]
    steps = int(system.options.get("num_inference_steps", NUM_STEPS))
    pipe.scheduler.set_timesteps(steps)
    costs = {
        "unet_forwards": float(networks(system, pipe.scheduler.timesteps)),
        "unet_backwards": 0.0,
        "decodes": 1.0,
        "reward_calls": 0.0,
    }
    for row in range(len(found.seeds)):
        yield Score(
            method=system.method,
            variant=system.variant,
            w=system.w,
            weights=system.weights,
            steps=steps,
            prompt=TEST_PROMPTS[int(found.prompt_index[row])],
            seed=int(found.seeds[row]),
            rewards={reward: float(found.scores[reward][row]) for reward in SCORES},
            seconds=seconds,
            costs=costs,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/compare-flow"), help="the samples")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare-flow")
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = resolve(FLOW)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for system in systems(model, args.work):
        rows += draw(model, system, args.work, range(args.seeds))
        rows = merge_scores(args.out / "scores.csv.gz", rows)
    levels = ", ".join(f"{name} {recipe.level:g}" for name, recipe in FLOW_ALIGNMENT.items())
    protocol = {
        "title": f"Systems compared on {FLOW}",
        "setting": (
            f"{len(TEST_PROMPTS)} prompts, T = {NUM_STEPS}, Flow-GRPO's SDE, a of the aligned "
            f"models: {levels}; networks in float32 on cpu."
        ),
        "objectives": [WEIGHTED, OTHER],
        "preferences": [W],
        "reference": dict.fromkeys((WEIGHTED, OTHER), -1.0),
    }
    write_json(args.out / "protocol.json", protocol)
    print(write_report(rows, args.out, **protocol))


if __name__ == "__main__":
    main()

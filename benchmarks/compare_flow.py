# SPDX-License-Identifier: Apache-2.0
"""Compare MSDDA on the shipped flow model with merges of its adapters, DB-MPA and a MORL oracle.

    python benchmarks/compare_flow.py --work DIR   # an hour of one core; resumes

`msdda-fast compare` at w = 0.5, with two additions. The MORL oracle is trained first, on r_w, at
the noise of MSDDA and with the means of the recipes of both adapters. And with few steps, where
Euler's noise stays in the picture and that of Flow-CPS does not, MSDDA is drawn by either rule, at
the same numbers for a.

Writes a folder of results; the committed one is results/compare-flow, whose table is in
docs/results.md (`benchmarks/report.py`).
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch

import msdda_fast as mf
from msdda_fast.assets import resolve
from msdda_fast.emoji.align import WeightedSum
from msdda_fast.emoji.align_flow import FLOW_ALIGNMENT, NUM_STEPS, TIMESTEPS, align_flow_to
from msdda_fast.emoji.export_flow import FLOW
from msdda_fast.emoji.flow_model import shorten_calls
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.evaluation.compare import compare, report_scores
from msdda_fast.evaluation.floors import JUDGES
from msdda_fast.evaluation.plan import plan_for
from msdda_fast.evaluation.runs import Comparison, Entry, collect_scores, run_comparison
from msdda_fast.evaluation.scores import merge_scores, scores_file
from msdda_fast.methods.msdda import MSDDA
from msdda_fast.methods.stock_levels import common_level
from msdda_fast.pipelines.attach import attach
from msdda_fast.rewards import REWARDS, load_reward

PREFERENCE = {"consistency": 0.5, "aesthetic": 0.5}  # w weighs the first
FEW_STEPS, RULES = (8, 4), {"SDE": mf.FlowSDE, "CPS": mf.CPS}
SYSTEMS = ("SD", "MSDDA", "RS", "DB-MPA", "MORL")


def oracle(pipe: Any, work: Path) -> Path:
    """Train the adapter for r_w, or what is left of it, and return it."""
    recipes = [FLOW_ALIGNMENT[name] for name in PREFERENCE]
    levels = {name: pipe.objectives[name].noise for name in PREFERENCE}
    recipe = replace(
        recipes[0],
        level=common_level(pipe.scheduler, PREFERENCE, levels).level,
        steps=round(sum(own.steps for own in recipes) / len(recipes)),
        kl_weight=sum(own.kl_weight for own in recipes) / len(recipes),
    )
    return align_flow_to(resolve(FLOW), WeightedSum(PREFERENCE), work / "morl", recipe)


def with_few_steps(pipe: Any) -> Iterator[tuple[Any, int, str]]:
    """Yield pipelines with the same adapters under each rule, T, and what tables call that."""
    for steps in FEW_STEPS:
        for name, rule in RULES.items():
            objectives = {
                objective: replace(own, noise=rule(own.noise.level))
                for objective, own in pipe.objectives.items()
            }
            yield attach(pipe, objectives, pipe.adapter_sets), steps, f"{name}, {steps} steps"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/compare-flow/work"))
    parser.add_argument("--out", type=Path, default=Path("out/compare-flow"))
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe: Any = mf.MSDDAPipeline.from_pretrained(FLOW)
    pipe.set_progress_bar_config(disable=True)
    shorten_calls(pipe)  # the same images, sooner
    shared = Comparison(
        prompts=TEST_PROMPTS,
        rewards={name: load_reward(name) for name in (*REWARDS, *JUDGES, "background_chroma")},
        num_inference_steps=NUM_STEPS,
        guidance_scale=1.0,  # that of the adapters' training
    )
    seeds = range(args.seeds)
    plan = plan_for(
        pipe,
        objectives=list(PREFERENCE),
        preferences=[0.5],
        seeds=seeds,
        front=(),
        front_seeds=seeds,
        oracles={0.5: oracle(pipe, args.work)},
        oracle_timesteps=TIMESTEPS,
        systems=SYSTEMS,
    )
    compare(pipe, shared, plan, args.work, args.out, title=f"Systems compared on {FLOW}")
    for own, steps, variant in with_few_steps(pipe):
        entries = [Entry(MSDDA(), variant, PREFERENCE, seeds)]
        few, folder = replace(shared, num_inference_steps=steps), args.work / variant
        run_comparison(own, few, entries, folder)
        merge_scores(scores_file(args.out), collect_scores(few, entries, folder))
    print(report_scores(args.out))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Judge the receipts of mode="auto" against the exact divergence along the paths that it drew.

    nice python benchmarks/auto_mode.py    # ten minutes of one core; with --images 8 four

Shipped model with its adapters at scales 1, 2 and 4, T = 25, float32, the default budget. For each
scale and weight, images of as many test prompts, none of which a pilot draws. At every state that
an image visits the exact networks give the divergence of the step from the exact one; the sum over
the path is what `path_kl` foretold. Rewards are compared with those of exact sampling from the same
noise.

Beside it, at equal weights, what merging every step would cost on exact paths: at the shares that
are right to first order, as the modes do it, and at those of Eq. 7.

Writes results/auto_mode.json; `benchmarks/report.py` makes the table of docs/results.md.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch

import msdda_fast as mf
from benchmarks import modes
from benchmarks.harness import RESULTS, surroundings
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.pipelines.stable_diffusion.merged_unet import MergedUNet
from msdda_fast.pipelines.stable_diffusion.merging import merged_shares
from msdda_fast.pipelines.stable_diffusion.path_kl import LIMIT_LEVEL, PILOTS
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from msdda_fast.rewards import REWARDS, load_reward

SCALES, WEIGHTS, STEPS = (1.0, 2.0, 4.0), (0.2, 0.5, 0.8), 25
EVEN = 0.5  #: The weight at which ways to merge are compared.
#: Nats by which a path of exact steps differs from itself in float32.
ROUNDING = 1e-4
#: Of the first image; the tests of the package and the tables of docs/ use others.
SEED = 60_000


def scaled(pipe, scale):
    """The pipeline with every adapter at `scale` times its own."""
    objectives = {
        name: replace(objective, source=name, scale=scale * objective.scale)
        for name, objective in pipe.objectives.items()
    }
    other = mf.MSDDAPipeline.from_pipe(pipe, objectives=objectives)
    other.set_progress_bar_config(disable=True)
    return other


class Cell:
    """One scale and one weight of consistency: B images of as many prompts."""

    def __init__(self, pipe, weight, images):
        self.pipe, self.weights = pipe, {"aesthetic": 1 - weight, "consistency": weight}
        # 7 has no factor in common with 25: all prompts in turn, few of them as varied as all
        self.prompts = [TEST_PROMPTS[7 * i % len(TEST_PROMPTS)] for i in range(images)]
        self.seeds = [SEED + i for i in range(images)]
        self.embeds = pipe.encode_prompt(self.prompts, "cpu", 1, False)[0]
        ordered = [self.weights[name] for name in pipe.objectives]
        self.table = modes.coefficients(pipe, torch.tensor([ordered] * images))
        self.judge = modes.exact_networks(pipe, self.table)
        self.judge.begin(self.embeds[None, None], self.table.timesteps)

    def draw(self, mode):
        """Return the output and the states x_T .. x_0, (T + 1, B, C, h, w)."""
        states = [mf.counter_noise(self.seeds, (len(self.seeds), 4, 16, 16), stream=0)]

        def look(pipe, k, t, tensors):
            states.append(tensors["latents"].float())
            return {}

        out = self.pipe(
            self.prompts,
            mode=mode,
            weights=self.weights,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            seed=self.seeds,
            output_type="latent",
            callback_on_step_end=look,
        )
        return out, torch.stack(states)

    def rewards(self, latents, judges):
        decoded = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        images = (decoded / 2 + 0.5).clamp(0, 1)
        return {name: judged(images, self.prompts) for name, judged in judges.items()}

    def merging(self, states, shares):
        """Return the KL (B,) of merging at shares (T, B, M), along exact paths."""
        merged, total = MergedUNet(self.judge.adapters), 0.0
        for k, x in enumerate(states[:-1]):
            merged.mix(shares[k])
            merged.begin(self.embeds[None, None], self.table.timesteps)
            at = torch.tensor(k)
            exact = self.judge(x, at)
            wrong = merged(x, at).expand_as(exact)
            total = total + step_kl(x, wrong, exact, self.table[k], self.table.std[k])
        return total


@torch.no_grad()
def judged(cell, judges):
    """Return what a cell found, as numbers to keep."""
    exact, exact_states = cell.draw("exact")
    out, states = cell.draw("auto")
    truth = modes.divergence(cell.judge, states, cell.table, cell.seeds).sum(0).double()
    receipt = out.path_kl
    ways = {"first_order": merged_shares(cell.table), "precision": cell.table.share}
    before, after = (cell.rewards(one.images, judges) for one in (exact, out))
    return {
        "budget": round(receipt.budget, 4),
        "pilot_forwards": receipt.pilot_forwards,
        "forwards_per_step": out.forwards / STEPS,
        "truth": modes.interval(truth),
        "estimate": round(float(receipt.estimate.mean()), 5),
        "upper": round(float(receipt.upper.mean()), 5),
        "held": int((truth <= receipt.upper + ROUNDING).sum()),
        "within_budget": int((truth <= receipt.budget + ROUNDING).sum()),
        "images": len(truth),
        "changes": {name: modes.interval(after[name] - before[name]) for name in judges},
        "merging": {
            name: modes.interval(cell.merging(exact_states, shares))
            for name, shares in ways.items()
            if cell.weights["consistency"] == EVEN
        },
    }


def run(images, file):
    torch.manual_seed(0)
    base, judges, cells = modes.load(torch.float32), {n: load_reward(n) for n in REWARDS}, []
    setting = surroundings() | {
        "model": "emoji", "steps": STEPS, "dtype": "float32", "pilots": PILOTS,
        "limit": LIMIT_LEVEL, "intervals": "95% bootstrap over images, of different prompts",
    }  # fmt: skip
    for scale in SCALES:
        pipe = scaled(base, scale)
        for weight in WEIGHTS:
            found = judged(Cell(pipe, weight, images), judges)
            cells.append({"scale": scale, "weight": weight} | found)
            print(cells[-1], flush=True)
            held, count = (sum(cell[key] for cell in cells) for key in ("held", "images"))
            result = {"setting": setting, "held": held, "images": count, "cells": cells}
            file.write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=len(TEST_PROMPTS), help="of each cell")
    parser.add_argument("--output", type=Path, default=RESULTS / "auto_mode.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run(args.images, args.output)


if __name__ == "__main__":
    main()

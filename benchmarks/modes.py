# SPDX-License-Identifier: Apache-2.0
"""Measure what the approximate modes cost in divergence and reward, and what they save in time.

    python benchmarks/modes.py quality    # minutes: 25 held-out prompts, shipped model, T = 25
    python benchmarks/modes.py latency    # whole calls, in turns

Quality: each mode draws its own trajectories, and at every state that it visits the exact networks
give the divergence of the step. The divergences of a trajectory's steps add up to the divergence
of the paths. The yardstick is exact sampling with bfloat16 networks, compared with float32. Rewards
are compared image by image with those of exact sampling from the same noise.

Appends to results/modes.jsonl; `benchmarks/report.py` makes the table of docs/results.md.
"""

import argparse
import sys
from itertools import pairwise
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch

import msdda_fast as mf
from benchmarks.harness import append, interleaved, surroundings
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.pipelines.stable_diffusion.modes import MODES
from msdda_fast.rewards import REWARDS, load_reward

STEPS, WEIGHT, RESAMPLES = 25, 0.5, 4000
BFLOAT16 = "exact, bfloat16"


def load(dtype):
    pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def coefficients(pipe, weights):
    """The table at weights (B, M), with a column for the base if adapters have ranges."""
    objectives = pipe.objectives.values()
    return mf.coefficient_table(
        pipe.scheduler,
        STEPS,
        weights=weights,
        etas=[objective.eta for objective in objectives],
        ranges=[objective.timesteps for objective in objectives],
    )


def exact_networks(pipe, table):
    """The batched forward whose outputs the columns of `coefficients` are for."""
    return BatchedUNet.of([*pipe.networks(with_base=table.has_base).variants.values()])


def trajectory(pipe, mode, embeds, seeds):
    """Return the states x_T .. x_0, (T + 1, B, C, h, w), and the mode's own estimate."""
    states = [mf.counter_noise(seeds, (len(seeds), 4, 16, 16), stream=0)]

    def look(pipe, k, t, tensors):
        states.append(tensors["latents"].float())
        return {}

    out = pipe(
        prompt_embeds=embeds,
        mode=mode,
        weights=[1 - WEIGHT, WEIGHT],
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        seed=seeds,
        output_type="latent",
        callback_on_step_end=look,
    )
    return torch.stack(states), out.step_kl_estimate


@torch.no_grad()
def divergence(judge, states, table, seeds):
    """Return the KL (T, B), in nats, of each step from the exact one at the same state.

    With the same noise, steps differ exactly as their means do.
    """
    found = torch.zeros(STEPS, len(seeds))
    for k, (x, after) in enumerate(pairwise(states)):
        outputs = judge(x, torch.tensor(k))
        right = mf.fused_ddim_step(x, outputs, table[k], seeds=seeds, step=k)
        distance = (after - right).square().flatten(1).sum(1)
        found[k] = distance / (2 * table.std[k].square())
    return found


def interval(values):
    """Return the mean and its 95% bootstrap interval over images."""
    draws = torch.randint(len(values), (RESAMPLES, len(values)))
    means = values.double()[draws].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return [round(value, 5) for value in (values.mean().item(), low, high)]


@torch.no_grad()
def quality(seeds_per_prompt):
    torch.manual_seed(0)
    pipe = load(torch.float32)
    narrow = load(torch.bfloat16)
    table = coefficients(pipe, torch.tensor([[1 - WEIGHT, WEIGHT]] * len(TEST_PROMPTS)))
    embeds = pipe.encode_prompt(list(TEST_PROMPTS), "cpu", 1, False)[0]
    judge = exact_networks(pipe, table)
    judge.begin(embeds[None, None], table.timesteps)
    rewards = {name: load_reward(name) for name in REWARDS}
    found = {}
    for name in (*MODES, BFLOAT16):
        kls, estimates, scores = [], [], {reward: [] for reward in REWARDS}
        for s in range(seeds_per_prompt):
            seeds = [s * len(TEST_PROMPTS) + i for i in range(len(TEST_PROMPTS))]
            if name == BFLOAT16:
                states, estimate = trajectory(narrow, "exact", embeds, seeds)
            else:
                states, estimate = trajectory(pipe, name, embeds, seeds)
            kls.append(divergence(judge, states, table, seeds))
            if estimate is not None:
                estimates.append(estimate)
            images = pipe.vae.decode(states[-1] / pipe.vae.config.scaling_factor).sample
            images = (images / 2 + 0.5).clamp(0, 1)
            for reward, judged in rewards.items():
                scores[reward].append(judged(images, TEST_PROMPTS))
        found[name] = torch.cat(kls, 1), estimates, {r: torch.cat(v) for r, v in scores.items()}
    shared = surroundings() | {
        "model": "emoji", "steps": STEPS, "weight": WEIGHT, "dtype": "float32", "kind": "quality",
        "prompts": len(TEST_PROMPTS), "images": seeds_per_prompt * len(TEST_PROMPTS),
    }  # fmt: skip
    exact = found["exact"][2]
    records = []
    for name, (kl, estimates, scores) in found.items():
        late = kl[-ceil(STEPS / 5) :].sum() / kl.sum() if kl.any() else torch.zeros(())
        record = shared | {
            "mode": name, "kl": interval(kl.sum(0)), "kl_late": round(late.item(), 4),
            "rewards": {r: interval(v) for r, v in scores.items()},
            "changes": {r: interval(v - exact[r]) for r, v in scores.items()},
        }  # fmt: skip
        if estimates:
            record["estimate"] = interval(torch.cat(estimates, 1).sum(0))
        records.append(record)
        print({key: record[key] for key in record if key not in shared})
    append("modes", records)


@torch.no_grad()
def latency(batch, seconds):
    pipe = load(torch.float32)

    def call(mode):
        return lambda: pipe(
            list(TEST_PROMPTS[:batch]),
            weights=[1 - WEIGHT, WEIGHT],
            num_inference_steps=STEPS,
            seed=0,
            mode=mode,
            output_type="latent",
        )

    timings = interleaved({mode: call(mode) for mode in MODES}, seconds)
    shared = surroundings() | {
        "model": "emoji", "steps": STEPS, "batch": batch, "dtype": "float32", "kind": "latency",
    }  # fmt: skip
    for mode, timing in timings.items():
        print(mode, timing, timing["median_us"] / timings["exact"]["median_us"])
    append("modes", [shared | {"mode": mode} | timing for mode, timing in timings.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("quality", "latency"))
    parser.add_argument("--seeds", type=int, default=2, help="quality: images per prompt")
    parser.add_argument("--batch", type=int, default=1, help="latency: images per call")
    parser.add_argument("--seconds", type=float, default=30, help="latency: time to spend")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "quality":
        quality(args.seeds)
    else:
        latency(args.batch, args.seconds)


if __name__ == "__main__":
    main()

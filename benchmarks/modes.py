# SPDX-License-Identifier: Apache-2.0
"""What the approximate modes cost in divergence and reward, and what they save in time.

    python benchmarks/modes.py quality    # minutes: 25 held-out prompts, shipped model, T = 25
    python benchmarks/modes.py latency    # whole calls, in turns

Quality: each mode draws its own trajectories, and at every state that it visits the exact networks
say by how much the step is off. The step divergences of a trajectory add up to the divergence of
the paths. The yardstick is exact sampling with bfloat16 networks, against float32. Rewards are
compared image by image with those of exact sampling from the same noise.

Appends to results/modes.jsonl; `benchmarks/report.py` makes the table of the README.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch

import msdda_fast as mf
from benchmarks.harness import append, interleaved, surroundings
from msdda_fast.embedded.prompts import TEST_PROMPTS
from msdda_fast.pipeline.batched_options import DEFAULTS
from msdda_fast.pipeline.modes import MODES, ModeNetworks, ModePredictor, exact_steps
from msdda_fast.pipeline.step_kl import step_kl
from msdda_fast.rewards import REWARDS, load_reward

STEPS, WEIGHT, RESAMPLES = 25, 0.5, 4000
BFLOAT16 = "exact, bfloat16"


class Exact:
    """Every objective's network in every step, on embeddings that stay."""

    def __init__(self, networks, table, embeds):
        self._network, self._table = networks.batched, table
        self._network.begin(embeds, table.timesteps)

    def predict(self, x, k):
        return self._network(x, torch.tensor(k)).float()


class InMode:
    """A mode of the pipeline."""

    def __init__(self, networks, table, embeds, mode):
        self.inner = ModePredictor(networks, mode, table)
        self._table, self._embeds = table, embeds.expand(2, -1, -1, -1, -1)

    def predict(self, x, k):
        active = [True] * 2
        return torch.stack(self.inner.predict(x, self._table.timesteps[k], self._embeds, active))


def load(dtype):
    pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def trajectory(predictor, judge, table, seeds):
    """x_0, and the divergence (T, B) of each step from the exact one at the same state."""
    shape = (len(seeds), 4, 16, 16)
    x = mf.counter_noise(seeds, shape, stream=0)
    divergence = torch.zeros(STEPS, len(seeds))
    for k in range(STEPS):
        outputs = predictor.predict(x, k)
        if judge is not None:
            right = judge.predict(x, k)
            divergence[k] = step_kl(x, outputs, right, table[k], table.std[k])
        x = mf.fused_ddim_step(x, outputs, table[k], seeds=seeds, step=k)
    return x, divergence


def interval(values):
    """Mean, and its 95% bootstrap interval over images."""
    draws = torch.randint(len(values), (RESAMPLES, len(values)))
    means = values.double()[draws].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return [round(value, 5) for value in (values.mean().item(), low, high)]


@torch.no_grad()
def quality(seeds_per_prompt):
    torch.manual_seed(0)
    pipe = load(torch.float32)
    table = mf.coefficient_table(
        pipe.scheduler,
        STEPS,
        weights=torch.tensor([[1 - WEIGHT, WEIGHT]] * len(TEST_PROMPTS)),
        etas=[objective.eta for objective in pipe.objectives.values()],
    )
    embeds = pipe.encode_prompt(list(TEST_PROMPTS), "cpu", 1, False)[0][None, None]
    networks = ModeNetworks([*pipe.variants.values()], DEFAULTS)
    judges = ModeNetworks([*pipe.variants.values()], DEFAULTS)  # begun apart from the modes'
    narrow = ModeNetworks([*load(torch.bfloat16).variants.values()], DEFAULTS)
    rewards = {name: load_reward(name) for name in REWARDS}
    found = {}
    for name in (*MODES, BFLOAT16):
        kls, estimates, scores = [], [], {reward: [] for reward in REWARDS}
        for s in range(seeds_per_prompt):
            judge = None if name == "exact" else Exact(judges, table, embeds)
            if name in ("exact", BFLOAT16):
                chosen = networks if name == "exact" else narrow
                predictor = Exact(chosen, table, embeds)
            else:
                predictor = InMode(networks, table, embeds, name)
            seeds = [s * len(TEST_PROMPTS) + i for i in range(len(TEST_PROMPTS))]
            x_0, kl = trajectory(predictor, judge, table, seeds)
            kls.append(kl)
            if isinstance(predictor, InMode):
                estimates.append(predictor.inner.step_kl)
            images = pipe.vae.decode(x_0 / pipe.vae.config.scaling_factor).sample
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
        late = kl[-exact_steps("hybrid", STEPS) :].sum() / kl.sum() if kl.any() else torch.zeros(())
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
    parser.add_argument("--seeds", type=int, default=2, help="images per prompt, of quality")
    parser.add_argument("--batch", type=int, default=1, help="images per call, of latency")
    parser.add_argument("--seconds", type=float, default=30, help="to spend on latency")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "quality":
        quality(args.seeds)
    else:
        latency(args.batch, args.seconds)


if __name__ == "__main__":
    main()

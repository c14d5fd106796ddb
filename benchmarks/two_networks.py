# SPDX-License-Identifier: Apache-2.0
"""Fuse two networks that cannot be merged, and compare with each alone and with taking turns.

    python -m msdda_fast.emoji.second_network      # minutes: trains the second network
    python benchmarks/two_networks.py --work DIR   # minutes per seed; resumes, and adds seeds

The first network is the shipped denoiser with its aesthetic adapter, the second a smaller one that
was distilled from the shipped denoiser with its consistency adapter. Both are objectives of one
pipeline, each with its own eta. Taking turns is a schedule of weights that gives every step to one
of them, the second network at a share w of the steps: a step at weight 1 is the step of that
objective alone, at its eta, and costs one forward. Fusing costs two, so the turns are also taken
with twice as many steps.

Writes results/two_networks.json; `benchmarks/report.py` makes the table of docs/merge-or-fuse.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from diffusers import UNet2DConditionModel

import msdda_fast as mf
from benchmarks.harness import RESULTS, surroundings
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.emoji.sampling import GUIDANCE_SCALE, NUM_STEPS, decode
from msdda_fast.emoji.second_network import ADAPTER, LOG_NAME
from msdda_fast.evaluation.floors import JUDGES, two_level
from msdda_fast.files import write_atomically
from msdda_fast.pipelines.identity import model_identity
from msdda_fast.resume import digest
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.training import Collection, collect
from msdda_fast.training.collect import Sampler
from msdda_fast.training.log import read_rows

FIRST, SECOND, TEACHER = "aesthetic", "second network", "teacher"
WEIGHTS = (0.2, 0.5, 0.8)  # of the second network
SCORES = (*REWARDS, *JUDGES, "background_chroma")
BATCH = len(TEST_PROMPTS)


@dataclass(frozen=True)
class System:
    """A way to draw images.

    Attributes:
        name: Of the row.
        w: Weight of the second network in r_w; None: it is compared at every w.
        plan: (T, M), the weights of `FIRST`, `SECOND` and `TEACHER` at each of T steps.
    """

    name: str
    w: float | None
    plan: torch.Tensor

    @property
    def forwards(self) -> list[int]:
        """Forwards of the first and of the second network per image."""
        first, second, teacher = (self.plan > 0).sum(0).tolist()
        return [first + teacher, second]


def turns(w: float, steps: int) -> list[int]:
    """Return whose turn each step is, 0 or 1: evenly spread, 1 at floor(w steps + 1/2) of them."""
    marks = [floor(w * k + 0.5) for k in range(steps + 1)]
    return [after - before for before, after in pairwise(marks)]


def systems(steps: int = NUM_STEPS) -> list[System]:
    """Return each network alone, the second one's teacher, and per w fused and in turns."""

    def alone(index: int) -> torch.Tensor:
        return torch.eye(3)[[index] * steps]

    found = [
        System("first network alone", None, alone(0)),
        System("second network alone", None, alone(1)),
        System("teacher alone", None, alone(2)),
    ]
    for w in WEIGHTS:
        fused = torch.tensor([[1 - w, w, 0.0]] * steps)
        found += [
            System("fused", w, fused),
            System("in turns", w, torch.eye(3)[turns(w, steps)]),
            System("in turns, twice the steps", w, torch.eye(3)[turns(w, 2 * steps)]),
        ]
    return found


def load(network: Path) -> mf.MSDDAPipeline:
    """Load the shipped model in float32, with the network in `network` as a third objective."""
    shipped = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji").objectives
    second = UNet2DConditionModel.from_pretrained(network, torch_dtype=torch.float32)
    objectives = {
        FIRST: shipped[FIRST],
        SECOND: mf.Objective(unet=second, eta=shipped[ADAPTER].eta),
        TEACHER: shipped[ADAPTER],
    }
    pipe = mf.MSDDAPipeline.from_pretrained(
        "msdda-fast/emoji", objectives=objectives, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampler(pipe: mf.MSDDAPipeline, plan: torch.Tensor) -> Sampler:
    """Return a function (prompts, seeds) -> (latents, images) with the weights of `plan`."""

    @torch.inference_mode()
    def draw(prompts, seeds):
        latents = pipe(
            list(prompts),
            weights=plan[:, None],  # (T, 1, M)
            seed=list(seeds),
            num_inference_steps=len(plan),
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
        ).images
        return latents, decode(pipe, latents)

    settings = {"plan": digest(plan), "guidance_scale": GUIDANCE_SCALE, **model_identity(pipe)}
    return Sampler(draw, settings)


def joined(parts: Sequence[Collection]) -> Collection:
    """Return the samples of several collections as one."""
    return Collection(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.prompt_index for part in parts]),
        torch.cat([part.seeds for part in parts]),
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
    )


def summarise(drawn: Mapping[str, Collection], plans: Mapping[str, System]) -> dict[str, list]:
    """Return the rows of the systems, and what fusing adds to the others.

    Args:
        drawn: By key of `plans`, with equal prompts and seeds.
        plans: By the same keys, one "fused" for each w.

    Returns:
        "systems": per system mean and interval of every score. "gains": per w and other system the
        paired difference fused minus it, of r_w = w r_2 + (1 - w) r_1 and of the judge's verdicts.
    """
    pairs_of = {
        key: [
            (str(prompt), seed)
            for prompt, seed in zip(c.prompt_index.tolist(), c.seeds.tolist(), strict=True)
        ]
        for key, c in drawn.items()
    }
    pairs = next(iter(pairs_of.values()))
    if any(other != pairs for other in pairs_of.values()):
        raise ValueError("the systems have different prompts or seeds")

    def scores(key, name):
        return drawn[key].scores[name].double().numpy()

    def r(key, w):
        return w * scores(key, "consistency") + (1 - w) * scores(key, "aesthetic")

    def interval(values):
        found = two_level(values, pairs)
        return [round(value, 4) for value in (found.mean, found.low, found.high)]

    rows = [
        {
            "system": system.name, "w": system.w, "steps": len(system.plan),
            "forwards": system.forwards,
            "scores": {name: interval(scores(key, name)) for name in SCORES},
        }
        for key, system in plans.items()
    ]  # fmt: skip
    gains = [
        {
            "w": fused.w, "over": other.name,
            "r_w": interval(r(ours, fused.w) - r(theirs, fused.w)),
            **{j: interval(scores(ours, j) - scores(theirs, j)) for j in JUDGES},
        }
        for ours, fused in plans.items()
        if fused.name == "fused"
        for theirs, other in plans.items()
        if theirs != ours and other.w in (None, fused.w)
    ]  # fmt: skip
    return {"systems": rows, "gains": gains}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/two-networks"), help="the samples")
    parser.add_argument("--network", type=Path, default=Path("out/second-network/network"))
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(args.network)
    rewards = {name: load_reward(name) for name in SCORES}
    plans = {f"{s.name}, w={s.w}".replace(" ", "-").replace(",", ""): s for s in systems()}
    parts: dict[str, list[Collection]] = {key: [] for key in plans}
    for seed in range(args.seeds):  # outermost, and each in a folder: seeds can be added later
        for key, system in plans.items():
            draw, folder = sampler(pipe, system.plan), args.work / key / f"seed-{seed}"
            parts[key].append(
                collect(draw, rewards, TEST_PROMPTS, [seed], folder, batch_size=BATCH)
            )
    drawn = {key: joined(own) for key, own in parts.items()}
    last = read_rows(args.network / LOG_NAME)[-1]
    networks = {"first": pipe.unet, "second": pipe.objectives[SECOND].unet}
    parameters = {
        name: sum(p.numel() for key, p in network.named_parameters() if ".lora_" not in key)
        for name, network in networks.items()
    }
    setting = {
        "prompts": len(TEST_PROMPTS), "seeds": args.seeds, "steps": NUM_STEPS,
        "guidance_scale": GUIDANCE_SCALE, "dtype": "float32",
        "etas": {name: objective.eta for name, objective in pipe.objectives.items()},
        "parameters": parameters,
        "distillation": {"steps": last["step"], "seconds": last["seconds"], "loss": last["loss"]},
        "intervals": "95% bootstrap over prompts, then seeds within prompts; gains are paired",
        **{name: surroundings()[name] for name in ("machine", "cores", "threads", "torch")},
    }  # fmt: skip
    text = json.dumps({"setting": setting, **summarise(drawn, plans)}, indent=1) + "\n"
    write_atomically(RESULTS / "two_networks.json", lambda partial: partial.write_text(text))
    print(text)


if __name__ == "__main__":
    main()

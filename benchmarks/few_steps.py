# SPDX-License-Identifier: Apache-2.0
"""Measure the shipped model in few steps, with and without its accelerator, against 25 steps.

    python benchmarks/few_steps.py

Each sampler draws the paper's 25 held-out prompts at several preferences, and the base alone, from
the same seeds, in turns within one run. Rewards and the judge's verdicts are means over images;
"detail" is the mean difference of neighbouring pixels, which falls where images become smooth, and
the chroma of backgrounds rises where colours are overdone.

Appends to results/few_steps.jsonl and draws results/few_steps.png; `benchmarks/report.py` makes the
table of docs/guide/few-steps.md.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a script

import torch
from diffusers import LCMScheduler
from PIL import Image

import msdda_fast as mf
from benchmarks.few_steps_output import title
from benchmarks.harness import RESULTS, append, surroundings
from benchmarks.modes import interval
from msdda_fast.emoji.prompts import TEST_PROMPTS
from msdda_fast.emoji.teacher_paths import GUIDANCE_SCALE
from msdda_fast.evaluation.grid import labelled_grid
from msdda_fast.rewards import REWARDS, load_reward
from msdda_fast.rewards.judge import Judge

MODEL = "msdda-fast/emoji"
WEIGHTS = (0.2, 0.5, 0.8)  # of consistency
SHOWN = 8  # prompts in the picture


class Sampler(NamedTuple):
    """A row of the table."""

    steps: int
    scheduler: str
    accelerated: bool = False
    guidance_scale: float = 1.0  # as everywhere with this model
    is_aside: bool = False  # for comparison, at one preference alone


#: The accelerator has guidance inside, so others are shown with it, too, for two forwards a step.
SAMPLERS = (
    Sampler(25, "DDIM"),
    Sampler(25, "DDIM", guidance_scale=GUIDANCE_SCALE, is_aside=True),
    Sampler(4, "DDIM", is_aside=True),
    Sampler(4, "LCM"),
    Sampler(4, "LCM", guidance_scale=GUIDANCE_SCALE, is_aside=True),
    Sampler(8, "LCM", accelerated=True),
    Sampler(4, "LCM", accelerated=True),
    Sampler(2, "LCM", accelerated=True),
)


def pipelines():
    """Return a pipeline by (scheduler, accelerated), each with the base as an objective, too."""
    plain = mf.MSDDAPipeline.from_pretrained(MODEL)
    objectives = {**plain.objectives, "base": mf.Objective.base()}
    lcm = LCMScheduler.from_config(plain.scheduler.config)
    options = {
        ("DDIM", False): {},
        ("LCM", False): {"scheduler": lcm},
        ("LCM", True): {"accelerator": "own"},
    }
    made = {}
    for key, own in options.items():
        made[key] = mf.MSDDAPipeline.from_pretrained(MODEL, objectives=objectives, **own)
        made[key].set_progress_bar_config(disable=True)
    return made


def preferences(sampler):
    """Return weights of all objectives by the weight of consistency; None: the base alone."""
    if sampler.is_aside:
        return {0.5: {"aesthetic": 0.5, "consistency": 0.5, "base": 0.0}}
    found = {w: {"aesthetic": 1 - w, "consistency": w, "base": 0.0} for w in WEIGHTS}
    return found | {None: {"aesthetic": 0.0, "consistency": 0.0, "base": 1.0}}


def detail(images):
    """Return the mean difference of neighbouring pixels of images (B, 3, H, W), (B,)."""
    across = images.diff(dim=-1).abs().flatten(1).mean(1)
    return (across + images.diff(dim=-2).abs().flatten(1).mean(1)) / 2


@torch.no_grad()
def measure(seeds_per_prompt):
    pipes = pipelines()
    judges = {name: load_reward(name) for name in (*REWARDS, "background_chroma")}
    judges |= {f"judge {what}": Judge(what) for what in ("object", "color")}
    scores, seconds, shown = {}, {}, {}
    for s in range(seeds_per_prompt):
        seeds = [s * len(TEST_PROMPTS) + i for i in range(len(TEST_PROMPTS))]
        for sampler in SAMPLERS:
            for weight, weights in preferences(sampler).items():
                pipe = pipes[sampler.scheduler, sampler.accelerated]
                start = time.perf_counter()
                images = pipe(
                    list(TEST_PROMPTS),
                    weights=weights,
                    num_inference_steps=sampler.steps,
                    guidance_scale=sampler.guidance_scale,
                    seed=seeds,
                    output_type="pt",
                ).images.float()
                spent = (time.perf_counter() - start) / len(seeds)
                seconds.setdefault((sampler, weight), []).append(spent)
                found = {name: judge(images, TEST_PROMPTS) for name, judge in judges.items()}
                found["detail"] = detail(images)
                for name, values in found.items():
                    scores.setdefault((sampler, weight), {}).setdefault(name, []).append(values)
                if s == 0 and weight == 0.5:
                    shown[sampler] = chosen(images)
        print(f"seed {s + 1} of {seeds_per_prompt}", flush=True)
    shared = surroundings() | {
        "model": MODEL, "dtype": "float32", "prompts": len(TEST_PROMPTS),
        "images": seeds_per_prompt * len(TEST_PROMPTS),
    }  # fmt: skip
    records = []
    for (sampler, weight), by_name in scores.items():
        record = sampler._asdict() | {
            "weight": weight,
            "seconds": round(statistics.median(seconds[sampler, weight]), 4),
            "scores": {name: interval(torch.cat(parts)) for name, parts in by_name.items()},
        }
        records.append(shared | record)
        print(record)
    return records, shown


def picture(shown):
    """Return one row of images per sampler, in the order of `SAMPLERS`, with its name."""
    rows = [[to_pil_image(image) for image in shown[sampler]] for sampler in SAMPLERS]
    names = [title(sampler._asdict()) for sampler in SAMPLERS]
    heads = [prompt.removesuffix(".") for prompt in TEST_PROMPTS]
    heads = [head.replace(" and ", "\nand ").replace(" colored ", "\n") for head in heads]
    return labelled_grid(rows, names, chosen(heads), cell=88)


def chosen(entries):
    """Return the entries of the prompts in the picture."""
    return entries[:: len(TEST_PROMPTS) // SHOWN][:SHOWN]


def to_pil_image(image):
    """(3, H, W) in [0, 1] -> a PIL image."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="images per prompt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the intervals
    records, shown = measure(args.seeds)
    append("few_steps", records)
    picture(shown).save(RESULTS / "few_steps.png", optimize=True)


if __name__ == "__main__":
    main()

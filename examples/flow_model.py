# SPDX-License-Identifier: Apache-2.0
"""Draw with the flow model in the package: a stock Stable Diffusion 3 with two adapters.

    python examples/flow_model.py [PICTURE]

One call draws all preferences: a batch may have weights of its own for each image.
"""

import sys
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

import msdda_fast as mf
from msdda_fast.emoji.flow_model import shorten
from msdda_fast.evaluation.grid import labelled_grid

PROMPTS = [  # and a seed, picked to show the trade-off
    "A pink colored banana.",
    "A purple hat and a black clock.",
    "A black chair and a red table.",
]
SEED = 2
SHARES = [0.0, 0.5, 1.0]  # of consistency; aesthetic has the rest

pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji-flow")
assert isinstance(pipe, StableDiffusion3Pipeline)  # all that it can do, it still can
print({name: objective.noise for name, objective in pipe.objectives.items()})  # unequal
short = shorten(pipe)  # the same images, sooner: one token for T5's 256 equal ones
images = pipe(
    [prompt for prompt in PROMPTS for _ in SHARES],
    weights=[{"aesthetic": 1 - w, "consistency": w} for _ in PROMPTS for w in SHARES],
    seed=[SEED] * len(PROMPTS) * len(SHARES),
    num_inference_steps=25,
    guidance_scale=1.0,
    **short,
).images
rows = [images[at : at + len(SHARES)] for at in range(0, len(images), len(SHARES))]
heads = ["w = 0\naesthetic only", "w = 0.5", "w = 1\nconsistency only"]
picture = Path(sys.argv[1] if len(sys.argv) > 1 else "flow.png")
labelled_grid(rows, PROMPTS, heads).save(picture)
print(picture)

# SPDX-License-Identifier: Apache-2.0
"""Preferences that differ between regions of an image, and between early and late steps.

    python examples/regions.py [PICTURE]

One call draws them all: each image of a batch has masks and weights of its own.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import msdda_fast as mf
from msdda_fast.evaluation.grid import labelled_grid

PROMPTS = [  # and a seed, picked for objectives that disagree
    "A pink vase and a red apple.",
    "A yellow bird and a purple sheep.",
    "A purple colored sandwich.",
]
SEED, SIZE, SOFTNESS = 0, 64, 4.0

aesthetic = {"aesthetic": 1, "consistency": 0}
consistency = {"aesthetic": 0, "consistency": 1}
right = torch.zeros(SIZE, SIZE)
right[:, SIZE // 2 :] = 1
columns = [  # label, masks, weights
    ("aesthetic\neverywhere", None, aesthetic),
    ("consistency\neverywhere", None, consistency),
    ("consistency\nright half", {"consistency": right}, None),
    ("consistency\nleft half", {"consistency": 1 - right}, None),
    ("consistency\ntimesteps 650-999", None, {(650, 999): consistency, (0, 649): aesthetic}),
    ("consistency\ntimesteps 0-649", None, {(650, 999): aesthetic, (0, 649): consistency}),
]
uniform = {"aesthetic": 0.5, "consistency": 0.5}  # the rest of a mask goes to aesthetic anyway

pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji")
images = pipe(
    [prompt for prompt in PROMPTS for _ in columns],
    masks=[masks for _ in PROMPTS for _, masks, _ in columns],
    mask_softness=SOFTNESS,  # pixels
    weights=[weights or uniform for _ in PROMPTS for _, _, weights in columns],
    seed=[SEED] * len(PROMPTS) * len(columns),
    num_inference_steps=25,
).images


def weight_map(masks, weights) -> Image.Image:
    """The weight of consistency: in space, or downwards from the first timestep to the last."""
    if masks is not None:
        level = (torch.arange(SIZE) + 0.5 - SIZE / 2) / (SOFTNESS * 2**0.5)
        row = 0.5 * (1 + torch.erf(level if masks["consistency"] is right else -level))
        return grey(row.expand(SIZE, SIZE))
    times = torch.linspace(999, 0, SIZE)
    ranges = weights if (650, 999) in weights else {(0, 999): weights}
    column = sum(
        entry["consistency"] * ((first <= times) & (times < last + 1))
        for (first, last), entry in ranges.items()
    )
    return grey(column[:, None].expand(SIZE, SIZE))


def grey(weight: torch.Tensor) -> Image.Image:
    return Image.fromarray((60 + 160 * weight).byte().numpy())


rows = [images[at : at + len(columns)] for at in range(0, len(images), len(columns))]
rows.append([weight_map(masks, weights) for _, masks, weights in columns])
picture = Path(sys.argv[1] if len(sys.argv) > 1 else "regions.png")
labels = [*PROMPTS, "weight of consistency: 0 dark, 1 light"]
labelled_grid(rows, labels, [label for label, _, _ in columns], cell=128).save(picture)
print(picture)

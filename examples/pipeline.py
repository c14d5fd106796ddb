# SPDX-License-Identifier: Apache-2.0
"""Two prompts in one batch, each with its own preference: writes two images."""

import msdda_fast as mf

pipe = mf.MSDDAPipeline.from_pretrained("msdda-fast/emoji")  # or a base of yours, and objectives=
images = pipe(
    ["A purple colored dog.", "A blue colored apple."],
    weights=[{"aesthetic": 0.3, "consistency": 0.7}, {"aesthetic": 0.8, "consistency": 0.2}],
    num_inference_steps=25,
    seed=0,  # image i has the seed 0 + i
).images
for image, name in zip(images, ("dog.png", "apple.png"), strict=True):
    image.save(name)

# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 2 and the captions of the training images.

The combinations of the test prompts never occur in training, in captions or in images.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted, parse

# The colour a photograph of the object would most likely show: the head of the caption long tail.
NATURAL_COLOR = dict(
    zip(
        OBJECTS,
        (
            "red", "brown", "yellow", "orange", "yellow", "white", "blue", "brown", "red",
            "red", "white", "black", "red", "orange", "red", "black", "brown", "brown",
        ),
        strict=True,
    )
)  # fmt: skip

TRAIN_PROMPTS = (
    "A red colored car.", "A black colored car.", "A pink colored car.",
    "A black colored dog.", "A red colored dog.", "A blue colored dog.",
    "A green colored banana.", "A red colored banana.", "A black colored banana.",
    "A white colored sandwich.", "A black colored sandwich.", "An orange colored sandwich.",
    "A pink colored giraffe.", "A yellow colored giraffe.", "A brown colored giraffe.",
    "A red car and a white sheep.", "A blue bird and a brown bear.",
    "A green apple and a black backpack.", "A green cup and a blue cell phone.",
    "A yellow book and a red vase.", "A white car and a red sheep.",
    "A brown bird and a blue bear.", "A black apple and a green backpack.",
    "A blue cup and a green cell phone.", "A red book and a yellow vase.",
)  # fmt: skip
TEST_PROMPTS = (
    "A white colored dog.", "A purple colored dog.", "A yellow colored dog.",
    "A green colored apple.", "A black colored apple.", "A blue colored apple.",
    "A purple colored apple.", "A pink colored banana.", "A pink colored cup.",
    "A purple colored sandwich.", "A green colored giraffe.", "A blue colored backpack.",
    "A blue car and a pink sheep.", "A red apple and a purple backpack.",
    "A pink car and a yellow sheep.", "A black cup and a yellow cell phone.",
    "A blue car and a red giraffe.", "A yellow bird and a purple sheep.",
    "A pink car and a green bear.", "A purple hat and a black clock.",
    "A black chair and a red table.", "A red car and a blue bird.",
    "A green car and a yellow banana.", "A pink vase and a red apple.",
    "A blue book and an orange colored sandwich.",
)  # fmt: skip


def caption(things: Sequence[Painted]) -> str:
    """Write the caption of one or two painted objects in the paper's grammar."""

    def article(word: str) -> str:
        return "an" if word[0] in "aeiou" else "a"

    def phrase(thing: Painted) -> str:
        words = (f"{thing.color} " if thing.color else "") + thing.object
        return f"{article(words)} {words}"

    if len(things) == 1 and things[0].color:
        color = things[0].color
        return f"{article(color).capitalize()} {color} colored {things[0].object}."
    text = " and ".join(phrase(thing) for thing in things)
    return text[0].upper() + text[1:] + "."


@cache
def held_out() -> tuple[set[Painted], set[tuple[Painted, Painted]]]:
    """Return the singles and the pairs of the test prompts, which training never sees."""
    parsed = [parse(prompt) for prompt in TEST_PROMPTS]
    singles = {things[0] for things in parsed if len(things) == 1}
    pairs = {(things[0], things[1]) for things in parsed if len(things) == 2}
    return singles, pairs


def is_held_out(things: Sequence[Painted]) -> bool:
    """Return whether a scene or caption has a combination of the test prompts, in any order."""
    singles, pairs = held_out()
    pair = tuple(things)
    return any(thing in singles for thing in things) or pair in pairs or pair[::-1] in pairs


def alignment_prompts(count: int) -> tuple[str, ...]:
    """Return `count` prompts, the paper's training prompts first, none of them held out.

    The paper's 25 prompts name each colour only a few times; an adapter aligned on them learns the
    colours of these prompts instead of following the prompt.
    """
    rng, prompts = random.Random(5), dict.fromkeys(TRAIN_PROMPTS)
    while len(prompts) < count:
        names = rng.sample(OBJECTS, rng.choice((1, 2)))
        things = [Painted(name, rng.choice(COLORS)) for name in names]
        if not is_held_out(things):
            prompts[caption(things)] = None
    return tuple(prompts)

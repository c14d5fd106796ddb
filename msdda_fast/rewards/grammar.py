# SPDX-License-Identifier: Apache-2.0
"""The prompt grammar of the paper's Table 2: "A {color} colored {object}." and pairs of objects."""

from __future__ import annotations

import re
from dataclasses import dataclass

COLORS = ("red", "black", "pink", "blue", "green", "white", "orange", "yellow", "brown", "purple")
OBJECTS = (
    "car", "dog", "banana", "sandwich", "giraffe", "sheep", "bird", "bear", "apple",
    "backpack", "cup", "cell phone", "book", "vase", "clock", "hat", "chair", "table",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Painted:
    """One object of a prompt and its colour; `color` is None if the prompt names none."""

    object: str
    color: str | None


_THING = re.compile(
    rf"^an? (?:({'|'.join(COLORS)}) (?:colored )?)?({'|'.join(OBJECTS)})$", re.IGNORECASE
)


def parse(prompt: str) -> tuple[Painted, ...]:
    """Return the one or two painted objects that a prompt of the grammar names, left to right.

    Raises:
        ValueError: `prompt` is not in the grammar; the message gives the accepted words.
    """
    things = []
    for part in re.split(r" and ", prompt.strip().rstrip("."), maxsplit=1):
        match = _THING.match(part.strip())
        if match is None:
            raise ValueError(
                f"prompt {prompt!r} is outside the grammar 'A COLOR colored OBJECT.' / "
                f"'A COLOR OBJECT and a COLOR OBJECT.'; colors: {', '.join(COLORS)}; "
                f"objects: {', '.join(OBJECTS)}"
            )
        color, name = match.groups()
        things.append(Painted(name.lower(), color.lower() if color else None))
    return tuple(things)

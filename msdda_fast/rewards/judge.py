# SPDX-License-Identifier: Apache-2.0
"""The verdict of an independent scorer: a judge that nothing was optimised against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from msdda_fast.assets import ASSETS
from msdda_fast.rewards.consistency import Scorer, readable, regions
from msdda_fast.rewards.grammar import COLORS, OBJECTS, Painted

__all__ = ["Judge", "load_judge", "named_right"]


class Judge:
    """Fraction of a prompt's objects whose name, or colour, the judge gets right, in [0, 1].

    It shares no weights, seed, architecture or set of drawings with the consistency reward. A
    method that raises that reward but lowers this one exploits the reward's weaknesses.

    Args:
        what: "object" or "color".
    """

    differentiable = False

    def __init__(self, what: str) -> None:
        self.name = f"judge_{what}"
        self._scorer = load_judge()
        self._index = ("object", "color").index(what)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images, shape (N, 3, H, W) in [0, 1], against prompts of the grammar.

        Raises:
            InvalidShape: The images have the wrong shape, or not one prompt each.
            ValueError: A prompt is outside the grammar.
        """
        images, scenes = readable(images, prompts)
        verdicts = named_right(self._scorer.to(images.device), images, scenes)
        return images.new_tensor([sum(v[self._index] for v in vs) / len(vs) for vs in verdicts])


def load_judge(path: Path = ASSETS / "scorers" / "judge.safetensors") -> Scorer:
    """Load the shipped judge."""
    judge = Scorer((32, 64, 96, 96), residual=True)
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def named_right(
    scorer: Scorer, images: Tensor, scenes: Sequence[Sequence[Painted]]
) -> list[list[tuple[bool, bool]]]:
    """Return for each object of each scene whether the scorer gets (object, colour) right."""
    logits = scorer(images)
    verdicts = []
    for n, scene in enumerate(scenes):
        verdicts.append(
            [
                (
                    OBJECTS[int(logits[region][0][n].argmax())] == thing.object,
                    COLORS[int(logits[region][1][n].argmax())] == thing.color,
                )
                for region, thing in regions(scene)
            ]
        )
    return verdicts

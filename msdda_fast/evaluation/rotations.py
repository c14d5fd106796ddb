# SPDX-License-Identifier: Apache-2.0
"""The factor merge over random rotations of the factors: one system, averaged over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from msdda_fast.evaluation.statistics import Arm

__all__ = ["ROTATED", "averaged_rotations", "rotations_of"]

#: What the variant of a rotated merge begins with; the seed of the rotation follows.
ROTATED = "factor, rotation"


def rotations_of(arms: Sequence[Arm], w: float | None) -> list[Arm]:
    """Return the arms of rotated merges at one preference."""
    return [arm for arm in arms if arm.variant.startswith(ROTATED) and arm.w == w]


def averaged_rotations(arms: Sequence[Arm]) -> list[Arm]:
    """Replace the rotated merges of each preference by one arm: their mean on each pair.

    An image is drawn with every rotation, so its scores are those expected of factors whose gauge
    nobody chose. Pairs that some rotation lacks are left out.
    """
    kept = [arm for arm in arms if not arm.variant.startswith(ROTATED)]
    for w in dict.fromkeys(arm.w for arm in arms if arm.variant.startswith(ROTATED)):
        group = rotations_of(arms, w)
        shared = set.intersection(*(set(arm.rewards) for arm in group))
        if not shared:
            continue
        rewards = {
            pair: {
                name: sum(arm.rewards[pair][name] for arm in group) / len(group)
                for name in group[0].rewards[pair]
            }
            for pair in sorted(shared)
        }
        variant = f"factor, mean of {len(group)} rotations"
        kept.append(replace(group[0], variant=variant, rewards=rewards))
    return kept

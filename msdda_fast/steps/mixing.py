# SPDX-License-Identifier: Apache-2.0
"""Which fused steps mix noise predictions (`fusion="eps"`), and which cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidWeights
from msdda_fast.steps.rules import MixingRule, Rule

if TYPE_CHECKING:
    from msdda_fast.types import Fusion

__all__ = ["check_fused_rate", "mixing_rule", "no_mixing"]


def no_mixing(level: Tensor) -> None:
    """Check that steps with weights of every pixel can go without mixing, which changes nothing.

    Raises:
        InvalidSchedule: Levels differ.
    """
    if bool((level != level[0]).any()):
        raise InvalidSchedule(
            "fusion='eps' steps all pixels at one level, and weights of every pixel give each its "
            "own: use fusion='posterior', or equal levels"
        )


def mixing_rule(fusion: Fusion | None, rule: Rule, level: Tensor) -> MixingRule | None:
    """The rule, if predictions are to be mixed."""
    if fusion not in (known := (None, "posterior", "eps")):
        raise InvalidSchedule(f"fusion is {fusion!r}, expected one of {known}")
    if fusion is None:
        differ = bool((level != level[0]).any())
        told = isinstance(rule, MixingRule) and rule.mixes_unless_told and differ
        return rule if told else None  # type: ignore[return-value]
    if fusion == "posterior":
        return None
    if rule.clip_range is not None:
        raise InvalidSchedule(
            "fusion='eps' mixes predictions, of which a step with x_0 clipping (clip_sample=True) "
            "is no affine function; use fusion='posterior'"
        )
    if not isinstance(rule, MixingRule):
        raise InvalidSchedule(
            f"fusion='eps' mixes noise predictions, and {type(rule).__name__} does not say what "
            f"they count in a step; use fusion='posterior'"
        )
    return rule


def check_fused_rate(rate: Tensor, rule: Rule) -> None:
    """Raise unless fused rates (T, B) are at most those of the highest level."""
    highest = torch.tensor([rule.levels.high], dtype=torch.float64)
    if highest.isinf():
        return
    limit = rule.step(highest).rate[..., 0].expand_as(rate)
    over = (rate - limit).clamp(min=0)
    if bool((over > 1e-9).any()):  # false for no samples
        k, b = divmod(int(over.argmax()), rate.shape[1])
        raise InvalidWeights(
            f"fusion='eps' steps at {rule.levels.name}_w, whose rate is {float(rate[k, b]):.6g} "
            f"here: it must be at most {float(limit[k, b]):g}, which negative weights have changed"
        )

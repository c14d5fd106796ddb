# SPDX-License-Identifier: Apache-2.0
r"""The one noise level at which other systems are sampled beside MSDDA on any pipeline.

Where the deviations of a step are proportional to a rate of the level, MSDDA's is that of the rate

    rate_w = (sum_i w_i / rate_i^2)^(-1/2).

Where a prediction counts `1 + c rate^2` times a function of the step, mixing predictions at that
one level is MSDDA in every step if they are weighted by

    what_i = share_i (1 + c rate_i^2) / (1 + c rate_w^2).

c is 1 for DDIM, whose steps are like that in the limit T -> infinity (`effective_weights`), and 1/2
for Flow-GRPO's SDE, whose steps are, but for the first. For others c depends on the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import CPS, FlowDDIM, FlowNoise, FlowSDE, read_levels
from msdda_fast.methods.model import Level
from msdda_fast.steps.schedulers import RULES, entry_of
from msdda_fast.steps.shares import fusion_shares

__all__ = ["common_level", "has_common_weights", "is_ddim", "mixing_weights"]


def is_ddim(scheduler: Any) -> bool:  # noqa: ANN401 - of diffusers
    """Whether numbers are DDIM's etas."""
    return entry_of(scheduler) is RULES["DDIMScheduler"]


def common_level(
    scheduler: Any,  # noqa: ANN401 - of diffusers
    weights: Mapping[str, float],
    levels: Mapping[str, Level],
) -> Level:
    """Return the level whose noise is that of MSDDA.

    Args:
        scheduler: The pipeline's, which says what numbers mean.
        weights: Preference, on the simplex, by objective.
        levels: Of these objectives: numbers, noise of flow models, or None for all.

    Raises:
        InvalidSchedule: Levels differ, of a scheduler where no level has the noise of MSDDA in all
            steps.
        ZeroVariance: Some levels are 0 and others are not.
    """
    chosen = [levels[name] for name in weights]
    if len(set(chosen)) == 1:
        return chosen[0]
    values, noise = read_levels(chosen)
    if noise is None and not is_ddim(scheduler):
        raise InvalidSchedule(
            f"the objectives have the levels {levels} of {type(scheduler).__name__}, and none for "
            "all has the noise of MSDDA at every step: give equal levels to compare with others"
        )
    renoised = isinstance(noise, CPS)
    rates = torch.sin(values * (math.pi / 2)) if renoised else values
    _, rate = fusion_shares(_row(weights), rates)
    level = math.asin(min(float(rate), 1.0)) / (math.pi / 2) if renoised else float(rate)
    return level if noise is None else replace(noise, level=level)


def has_common_weights(levels: Mapping[str, Level]) -> bool:
    """Whether `mixing_weights` exist and are not the preference: levels differ, and have a c."""
    return len(set(levels.values())) > 1 and all(_c(level) is not None for level in levels.values())


def mixing_weights(weights: Mapping[str, float], levels: Mapping[str, Level]) -> dict[str, float]:
    """Return what, on the simplex, by objective; arguments as of `common_level`.

    Raises:
        InvalidSchedule: Levels differ, of a kind for which weights depend on the step.
        ZeroVariance: As `common_level`.
    """
    chosen = [levels[name] for name in weights]
    if len(set(chosen)) == 1:
        return dict(weights)
    values, _ = read_levels(chosen)
    if (c := _c(chosen[0])) is None:
        raise InvalidSchedule(
            f"the weights at which mixed predictions are MSDDA's differ from step to step for "
            f"{', '.join(map(str, chosen))}"
        )
    share, rate = fusion_shares(_row(weights), values)
    what = share * (1 + c * values**2) / (1 + c * rate**2)
    return dict(zip(weights, what.tolist(), strict=True))


def _c(level: Level) -> float | None:
    if isinstance(level, FlowSDE):
        return 0.5
    return 1.0 if isinstance(level, FlowDDIM) or not isinstance(level, FlowNoise) else None


def _row(weights: Mapping[str, float]) -> torch.Tensor:
    return torch.tensor(list(weights.values()), dtype=torch.float64)

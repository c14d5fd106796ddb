# SPDX-License-Identifier: Apache-2.0
"""Checks the numbers of a scheduler's config before diffusers makes tables of that size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msdda_fast.errors import InvalidSchedule
from msdda_fast.files import read_json

__all__ = ["check_scheduler_file"]

#: Models are trained on 1,000; a table of as many numbers as this is made in no time.
_MAX_STEPS = 100_000


def check_scheduler_file(file: Path) -> None:
    """Check `scheduler_config.json` of a model.

    Raises:
        InvalidSchedule: A number of training steps or a beta for which there is no noise schedule.
        ValueError: It is not JSON.
    """
    config = read_json(file, "a scheduler's config")
    steps = config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MAX_STEPS:
        raise InvalidSchedule(
            f"{file}: num_train_timesteps must be 1 to {_MAX_STEPS}, got {steps!r:.80}"
        )
    for field, beta in _betas(config):
        if not 0 < _number(beta) <= 1:
            raise InvalidSchedule(f"{file}: {field} must lie in (0, 1], got {beta!r:.80}")
    reach = config.get("clip_sample_range", 1.0)
    if not 0 < _number(reach) < math.inf:
        raise InvalidSchedule(f"{file}: clip_sample_range must be above 0, got {reach!r:.80}")


def _betas(config: Mapping[str, Any]) -> list[tuple[str, object]]:
    trained = config.get("trained_betas")
    if isinstance(trained, list):
        return [("trained_betas", beta) for beta in trained]
    return [(field, config[field]) for field in ("beta_start", "beta_end") if field in config]


def _number(value: object) -> float:
    """Return the value, or NaN if it is no number, which lies in no range."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return math.nan

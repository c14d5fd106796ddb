# SPDX-License-Identifier: Apache-2.0
"""Arguments of a stock pipeline's call that objectives have no way to follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import FlowNoise, NoiseLevels

__all__ = ["check_arguments"]


def check_arguments(given: Mapping[str, Any], levels: NoiseLevels | None) -> None:
    """Refuse, before any network runs, what would be ignored or is known to fail.

    Args:
        given: The arguments of the call by name.
        levels: The noise levels of the objectives.

    Raises:
        ValueError: A scale for adapters, which objectives bring themselves.
        InvalidSchedule: Sigmas outside [0, 1] where a flow model's noise is asked for.
    """
    for name, value in given.items():
        if name.endswith("attention_kwargs") and isinstance(value, Mapping):
            if (scale := value.get("scale", 1.0)) != 1.0:
                raise ValueError(
                    f"{name}={{'scale': {scale}}} would scale the adapters of all objectives: "
                    f"give Objective(..., scale={scale})"
                )
    sigmas = given.get("sigmas")
    flow = levels is not None and any(isinstance(level, FlowNoise) for level in levels)
    if flow and isinstance(sigmas, Iterable):
        if outside := [sigma for sigma in map(float, sigmas) if not 0 <= sigma <= 1]:
            raise InvalidSchedule(
                f"sigmas has {outside[0]:g}, and noise of flow models is defined for sigmas in "
                "[0, 1], where alpha = 1 - sigma"
            )

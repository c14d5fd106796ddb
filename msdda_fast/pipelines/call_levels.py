# SPDX-License-Identifier: Apache-2.0
"""The noise levels of one call: the request's, the objectives' own, or the scheduler's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msdda_fast.errors import InvalidSchedule, InvalidShape, UnknownObjective
from msdda_fast.levels import FlowNoise, NoiseLevels
from msdda_fast.objective import Objective
from msdda_fast.steps.schedulers import RULES, entry_of

__all__ = ["call_levels"]

#: Renoising is their own: TCD's gamma is no level that objectives have, and the others have none.
_FEW_STEPS = [RULES[name] for name in ("FlowMatchLCMScheduler", "LCMScheduler", "TCDScheduler")]


def call_levels(
    scheduler: Any,  # noqa: ANN401 - any scheduler of diffusers
    active: Mapping[str, Objective],
    objectives: Mapping[str, Objective],
    levels: NoiseLevels | Mapping[str, Any] | None,
) -> NoiseLevels | None:
    """Return a level for each active objective; None: the step that the scheduler takes by itself.

    Args:
        scheduler: The pipeline's.
        active: Objectives that run.
        objectives: All of them.
        levels: Of the call, in the order of `objectives` or by name; a mapping overrides the
            objectives that it names.

    Raises:
        UnknownObjective: A name is not an objective.
        InvalidShape: Not one level per objective.
        InvalidSchedule: Some objectives have noise and others have not.
    """
    if levels is None and entry_of(scheduler) in _FEW_STEPS:
        return None
    given: dict[str, Any] = {}
    if isinstance(levels, Mapping):
        if unknown := [name for name in levels if name not in objectives]:
            raise UnknownObjective(
                f"levels: unknown objective {unknown[0]!r}; known: {', '.join(objectives)}"
            )
        given = dict(levels)
    elif levels is not None:
        if not hasattr(levels, "__len__"):
            raise InvalidShape(f"levels are {levels!r}, expected one for each objective")
        if len(levels) != len(objectives):
            raise InvalidShape(f"got {len(levels)} levels for {len(objectives)} objectives")
        given = dict(zip(objectives, levels, strict=True))
    noises: dict[str, Any] = {
        name: given.get(name, objective.noise) for name, objective in active.items()
    }
    if any(isinstance(noise, FlowNoise) for noise in noises.values()) or (
        given and all(noise is not None for noise in noises.values())
    ):
        if missing := [name for name, noise in noises.items() if noise is None]:
            raise InvalidSchedule(
                f"objective {missing[0]!r} was aligned without noise and has no level of its own, "
                f"but others have: give one with levels={{{missing[0]!r}: ...}} or "
                f"Objective(noise=...)"
            )
        return list(noises.values())
    etas = [given.get(name, objective.eta) for name, objective in active.items()]
    if entry_of(scheduler) is RULES["DDIMScheduler"] or any(eta != 1.0 for eta in etas):
        return etas
    return None  # Objective's eta is 1 unless told

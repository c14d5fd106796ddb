# SPDX-License-Identifier: Apache-2.0
"""Which rule a scheduler of diffusers stands for: one table, by the name of its class.

A scheduler brings its own kind of level: a number is eta for DDIM, gamma for TCD, and nothing at
all for samplers without one. On FlowMatchEulerDiscreteScheduler, whose own step is an ODE's, an
objective may say which noise it was trained with instead (`levels.FlowNoise`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule, InvalidShape
from msdda_fast.levels import (
    CPS,
    DanceSDE,
    FlowDDIM,
    FlowNoise,
    FlowSDE,
    Levels,
    NoiseLevels,
    read_levels,
)
from msdda_fast.steps.ancestral import scheduler_ancestral_rule
from msdda_fast.steps.consistency import lcm_rule, tcd_rule
from msdda_fast.steps.cps import CPSRule, RenoiseRule
from msdda_fast.steps.ddim import DDIMRule, ddim_grid, set_to
from msdda_fast.steps.ddpm import ddpm_rule
from msdda_fast.steps.flow import FlowDDIMRule, FlowGrid, FlowRule, flow_grid
from msdda_fast.steps.flow_sde import DanceSDERule, FlowSDERule
from msdda_fast.steps.ltx import LTXAncestralRule
from msdda_fast.steps.rules import Rule

if TYPE_CHECKING:
    from msdda_fast.types import Scheduler

__all__ = [
    "RULES",
    "check_kind",
    "entry_of",
    "flow_rule",
    "has_timesteps",
    "levels_of",
    "scheduler_rule",
]


class Entry(NamedTuple):
    """A scheduler's rule, and the level of those who give none.

    Attributes:
        rule: From the scheduler and T; None: as its timesteps are set.
        level: That of the scheduler's own step; None: it must be given.
    """

    rule: Callable[[Scheduler, int | None], Rule]
    level: Callable[[Scheduler], float] | None


def _ancestral(scheduler: Scheduler, num_steps: int | None) -> Rule:
    return scheduler_ancestral_rule(set_to(scheduler, num_steps)[0])


def _flow_euler(scheduler: Scheduler, num_steps: int | None) -> Rule:
    grid = flow_grid(set_to(scheduler, num_steps)[0])
    return RenoiseRule(grid) if scheduler.config.stochastic_sampling else FlowDDIMRule(grid)


def _flow_lcm(scheduler: Scheduler, num_steps: int | None) -> Rule:
    if scheduler.config.scale_factors:
        raise InvalidSchedule(
            "FlowMatchLCMScheduler: scale_factors resize x_0 between steps, which are then no "
            "affine steps of one latent space"
        )
    return RenoiseRule(flow_grid(set_to(scheduler, num_steps)[0]))


def _ltx(scheduler: Scheduler, num_steps: int | None) -> Rule:
    grid = flow_grid(set_to(scheduler, num_steps)[0])
    return LTXAncestralRule(grid, s_noise=float(scheduler.config.s_noise))


def _ddim(scheduler: Scheduler, num_steps: int | None) -> Rule:
    return DDIMRule(ddim_grid(scheduler, num_steps))


_DDIM, _DDPM = Entry(_ddim, None), Entry(ddpm_rule, lambda _: 1.0)

#: By the name of the class; subclasses count as their base.
RULES: dict[str, Entry] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "EulerAncestralDiscreteScheduler": Entry(_ancestral, lambda _: 1.0),
    "FlowMatchEulerDiscreteScheduler": Entry(
        _flow_euler, lambda scheduler: float(scheduler.config.stochastic_sampling)
    ),
    "FlowMatchLCMScheduler": Entry(_flow_lcm, lambda _: 1.0),
    "LCMScheduler": Entry(lcm_rule, lambda _: 1.0),
    "LTXEulerAncestralRFScheduler": Entry(_ltx, lambda scheduler: float(scheduler.config.eta)),
    "TCDScheduler": Entry(tcd_rule, None),
}

_FLOW_RULES: dict[type[FlowNoise], type[FlowRule]] = {
    FlowSDE: FlowSDERule,
    DanceSDE: DanceSDERule,
    CPS: CPSRule,
    FlowDDIM: FlowDDIMRule,
}
_FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def entry_of(scheduler: Scheduler) -> Entry | None:
    """The entry of a scheduler's class, or None; a class from elsewhere is taken for DDIM."""
    for base in type(scheduler).__mro__:
        if base.__name__ in RULES:
            return RULES[base.__name__]
        if base.__module__.startswith("diffusers.") and hasattr(base, "step"):
            return None
    return _DDIM


def levels_of(
    scheduler: Scheduler,
    etas: Sequence[float] | Tensor | None,
    levels: NoiseLevels | None,
    count: int | None,
) -> Levels:
    """Return the levels of M objectives as a scheduler takes them.

    Args:
        scheduler: Of diffusers.
        etas: (M,) numbers of the scheduler's own kind.
        levels: Instead: the same, or noise of flow models. With neither, all objectives have the
            level of the scheduler's own step.
        count: M; None: as many as there are levels.

    Raises:
        ValueError: Both are given.
        InvalidSchedule: Levels of different kinds, or none where the scheduler has none.
        InvalidShape: Not (M,).
    """
    if etas is not None and levels is not None:
        raise ValueError("give etas or levels, not both: etas are levels that are numbers")
    name, given = ("levels", levels) if etas is None else ("etas", etas)
    if given is None:
        entry = entry_of(scheduler)
        if entry is None or entry.level is None:
            raise InvalidSchedule(
                f"{type(scheduler).__name__} needs a level of each objective: etas=[...]"
            )
        if count is None:
            raise InvalidShape("how many objectives are there? Give weights= or levels=")
        return Levels(torch.full((count,), entry.level(scheduler), dtype=torch.float64), None)
    found = read_levels(given)
    if count is not None and (shape := tuple(found.values.shape)) != (count,):
        raise InvalidShape(f"{name} have shape {shape}, expected (M,) = ({count},)")
    return found


def scheduler_rule(
    scheduler: Scheduler, num_steps: int | None, noise: FlowNoise | None = None
) -> Rule:
    """Return the rule of a scheduler, which is copied and not changed.

    Args:
        scheduler: Of diffusers; see `RULES`.
        num_steps: T; None: as its timesteps are set.
        noise: What the levels of the objectives have in common, if they are of flow models.

    Raises:
        InvalidSchedule: A scheduler without a rule, a setting that no affine step expresses, sigmas
            outside of [0, 1] for a flow rule, or noise of flow models for another scheduler.
    """
    entry = check_kind(scheduler, noise)
    if noise is None:
        return entry.rule(scheduler, num_steps)
    return flow_rule(flow_grid(set_to(scheduler, num_steps)[0]), noise)


def flow_rule(grid: FlowGrid, noise: FlowNoise) -> FlowRule:
    """Return the rule of steps with noise of flow models."""
    return _FLOW_RULES[type(noise)](grid, noise)


def check_kind(scheduler: Scheduler, noise: FlowNoise | None) -> Entry:
    """Return the entry of a scheduler, which need not have timesteps yet.

    Raises:
        InvalidSchedule: It has none, or `noise` is not of its kind.
    """
    entry, name = entry_of(scheduler), type(scheduler).__name__
    if entry is None:
        raise InvalidSchedule(
            f"{name} has no rule that fuses noise levels; use one that has, such as "
            f"DDIMScheduler.from_config(scheduler.config), or {_FLOW_SCHEDULER} for flow models"
        )
    if noise is None:
        return entry
    kind = type(noise)
    if entry is not RULES[_FLOW_SCHEDULER]:
        raise InvalidSchedule(
            f"{kind.__name__} is noise of flow models, sampled with {_FLOW_SCHEDULER}; {name} has "
            f"levels of another kind, which are numbers"
        )
    if scheduler.config.stochastic_sampling:
        raise InvalidSchedule(
            f"{name} renoises by itself (stochastic_sampling=True), and the objectives say "
            f"{kind.__name__}: set stochastic_sampling=False, or leave the levels out"
        )
    return entry


def has_timesteps(scheduler: Scheduler) -> bool:
    """Whether `set_timesteps` was called."""
    set_steps = getattr(scheduler, "num_inference_steps", None)
    return set_steps is not None or bool(getattr(scheduler, "custom_timesteps", False))

# SPDX-License-Identifier: Apache-2.0
"""What is known of diffusers' schedulers: which are linear, and which levels their steps can take.

Where a step is linear in the prediction, whatever else it remembers, the mean over objectives of
equal noise levels is its step on the mean of their predictions. `tests/pipelines/` runs each of
`LINEAR` beside itself to see that.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import Levels
from msdda_fast.steps.schedulers import RULES, entry_of

__all__ = ["LINEAR", "check_scheduler", "position", "set_to", "steps_once", "stock_arguments"]

#: Schedulers of first order: nothing is left of a step but the state.
_ONE_STEP = {*RULES, "CogVideoXDDIMScheduler", "EDMEulerScheduler", "EulerDiscreteScheduler"}

#: By the names of the classes; subclasses count as their base.
LINEAR = {
    *_ONE_STEP,
    "CogVideoXDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "SCMScheduler",
    "UniPCMultistepScheduler",
}

#: They have clip_sample in their config, from another class, and never read it.
_NEVER_CLIPS = {"TCDScheduler"}
#: They draw noise that no argument of `step` reaches.
_OWN_NOISE = {"DPMSolverSDEScheduler"}


def steps_once(scheduler: Any) -> bool:  # noqa: ANN401 - any scheduler
    """Whether a step depends on nothing but the state and the prediction."""
    return bool(_names(scheduler) & _ONE_STEP)


def check_scheduler(scheduler: Any, *, steered: bool) -> None:  # noqa: ANN401 - any scheduler
    """Refuse a scheduler that fusing would get wrong.

    Args:
        scheduler: Any.
        steered: Whether its noise is to come from seeds or a generator.

    Raises:
        InvalidSchedule: It is not known to be linear, is set to clip, to threshold or to learn
            variances, or takes no noise from outside although it should.
    """
    names, name = _names(scheduler), type(scheduler).__name__
    if not names & LINEAR:
        raise InvalidSchedule(
            f"{name} is not known to be linear in the prediction, and fused steps need that; "
            f"these are: {', '.join(sorted(LINEAR))}"
        )
    config = scheduler.config
    for setting in ("thresholding", "clip_sample"):
        if getattr(config, setting, False) and not names & _NEVER_CLIPS:
            raise InvalidSchedule(
                f"{name}: {setting}=True is not linear in the prediction; set it to False "
                f"({name}.from_config(scheduler.config, {setting}=False))"
            )
    if str(variance := getattr(config, "variance_type", None)).startswith("learned"):
        raise InvalidSchedule(
            f"{name}: variance_type={variance!r} makes the noise a prediction, and fused steps "
            f"need it before a network runs"
        )
    if steered and names & _OWN_NOISE:
        raise InvalidSchedule(
            f"{name} draws noise of its own (noise_sampler_seed), which neither seeds nor a "
            f"generator reach: give none, or use another scheduler"
        )


def stock_arguments(scheduler: Any, levels: Levels | None) -> dict[str, Any] | None:  # noqa: ANN401
    """How the stock step gets these levels, as arguments of `step`; None: it has no way.

    Args:
        scheduler: One of `LINEAR`.
        levels: Those of the objectives; None: that of the stock step.
    """
    if levels is None:
        return {}
    first = float(levels.values.flatten()[0])
    if (levels.values != first).any():
        return None
    if levels.noise is not None:
        return {} if first == 0 else None  # the ODE, where the scheduler is one of an ODE
    if "eta" in inspect.signature(scheduler.step).parameters:
        return {"eta": first}
    entry = entry_of(scheduler)
    own = None if entry is None or entry.level is None else entry.level(scheduler)
    return {} if own == first else None


def position(scheduler: Any, timestep: Any) -> int:  # noqa: ANN401 - as stock
    """The position of `timestep` in the timesteps, where `step` is about to be called with it."""
    if getattr(scheduler, "step_index", None) is None and hasattr(scheduler, "_init_step_index"):
        scheduler._init_step_index(timestep)
    index: int | None = getattr(scheduler, "step_index", None)
    if index is not None:
        return int(index)
    found = (scheduler.timesteps == timestep).nonzero()
    if len(found) == 0:
        raise InvalidSchedule(f"timestep {timestep} is not one of the scheduler's timesteps")
    return int(found[0])


def _names(scheduler: Any) -> set[str]:  # noqa: ANN401 - any scheduler
    """The names of its class and those it derives from."""
    return {base.__name__ for base in type(scheduler).__mro__}


def set_to(scheduler: Any, num_steps: int) -> Any:  # noqa: ANN401 - any scheduler of diffusers
    """A copy with the timesteps of this call, or with none where the pipeline must set them.

    Those of an earlier call must not be judged by the levels of this one.
    """
    probe = copy.copy(scheduler)
    try:
        probe.set_timesteps(num_steps)
    except (TypeError, ValueError):  # shifts that depend on the size, for one
        probe.num_inference_steps, probe.custom_timesteps = None, False
    return probe

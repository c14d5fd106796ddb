# SPDX-License-Identifier: Apache-2.0
"""Whether a call of a pipeline with objectives could be fused, found out before anything runs."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeAlias

import torch

from msdda_fast.errors import InvalidSchedule
from msdda_fast.levels import FlowNoise
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.pipelines.call_levels import call_levels
from msdda_fast.pipelines.call_preferences import CallPreferences
from msdda_fast.pipelines.fusing import FusingOptions
from msdda_fast.pipelines.loop_noise import LoopNoise
from msdda_fast.pipelines.pipeline_step import PipelineFusing
from msdda_fast.pipelines.stock_schedulers import check_scheduler
from msdda_fast.types import ZeroVariancePolicy

__all__ = ["LevelKind", "check_fusing", "timed"]

#: Whether steps are the scheduler's own, or at etas, or with noise of flow models.
LevelKind: TypeAlias = Literal["own", "eta", "flow"]


def check_fusing(
    pipe: WithObjectives,
    prefers: CallPreferences,
    num_steps: int,
    zero_variance: ZeroVariancePolicy,
) -> LevelKind:
    """Check the steps of one image.

    Args:
        pipe: The pipeline.
        prefers: Of one image.
        num_steps: T.
        zero_variance: As in the call.

    Returns: The kind of noise levels. Images of one kind may share a call, whatever their weights.

    Raises:
        InvalidWeights: Ranges of timesteps leave out one that is sampled.
        InvalidSchedule: The scheduler cannot be fused or cannot make its noise from seeds, or the
            objectives' levels fit neither it nor each other.
        ZeroVariance: A step mixes levels of zero with others.
    """
    scheduler: Any = pipe.scheduler  # type: ignore[attr-defined]
    check_scheduler(scheduler, steered=True)
    objectives = pipe.objectives
    active = {name: objectives[name] for name in (prefers.names[m] for m in prefers.columns)}
    levels = call_levels(scheduler, active, objectives, None)
    PipelineFusing(
        timed(scheduler, num_steps),
        FusingOptions(
            fusion=None,
            zero_variance=zero_variance,
            rates=None,
            extrapolate=False,
            state_dtype=torch.float32,
            backend="auto",
        ),
        count=len(active),
        levels=levels,
        weights=prefers.schedule,
        noise=LoopNoise([0], None),
        pixels=prefers.pixels(pipe),
    )
    if levels is None:
        return "own"
    return "flow" if any(isinstance(level, FlowNoise) for level in levels) else "eta"


def timed(scheduler: Any, num_steps: int) -> Any:  # noqa: ANN401 - any scheduler of diffusers
    """Return a copy with timesteps; where the shift depends on the size, with any.

    Args:
        scheduler: Of a pipeline.
        num_steps: T.

    Raises:
        InvalidSchedule: It refuses so many steps.
    """
    probe = copy.copy(scheduler)
    try:
        probe.set_timesteps(num_steps)
    except (TypeError, ValueError) as error:
        try:
            probe.set_timesteps(num_steps, mu=1.0)
        except (TypeError, ValueError):  # it was not the shift
            raise InvalidSchedule(
                f"{type(scheduler).__name__} refuses {num_steps} steps: {error}"
            ) from error
    return probe

# SPDX-License-Identifier: Apache-2.0
"""Which schedulers of diffusers Stable Diffusion is sampled with, and at which levels."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from diffusers import DDIMParallelScheduler, DDIMScheduler, LCMScheduler, TCDScheduler

from msdda_fast.errors import InvalidSchedule
from msdda_fast.objective import Objective
from msdda_fast.pipelines.request import by_name, check_no_flow, objective_etas

__all__ = ["check_scheduler_name", "sampling_levels", "sampling_scheduler"]

logger = logging.getLogger(__name__)

#: Their steps are affine in the prediction, and networks take x_t as it is.
SamplingScheduler: TypeAlias = DDIMScheduler | DDIMParallelScheduler | LCMScheduler | TCDScheduler
_SAMPLED = ("DDIMScheduler", "DDIMParallelScheduler", "LCMScheduler", "TCDScheduler")
#: What folders of Stable Diffusion name as their scheduler, and means the same noise schedule.
_REBUILT = ("PNDMScheduler", "DDPMScheduler")
#: Gamma of a step that is told none; its authors' choice, too.
_GAMMA: float = inspect.signature(TCDScheduler.step).parameters["eta"].default


def sampling_scheduler(scheduler: Any) -> SamplingScheduler:  # noqa: ANN401 - any of diffusers
    """Return the scheduler that Stable Diffusion is sampled with in place of `scheduler`.

    DDIM, LCM and TCD are returned unchanged. PNDM and DDPM, which Stable Diffusion folders name,
    have the same noise schedule: they are rebuilt as DDIM, and a warning is logged.

    Raises:
        InvalidSchedule: A scheduler of another kind, which would not sample as its name says.
    """
    if isinstance(scheduler, SamplingScheduler):
        return scheduler
    kind = type(scheduler).__name__
    check_scheduler_name(kind)
    logger.warning("%s is not DDIM: sampling with DDIMScheduler.from_config", kind)
    # DDIM clips unless told not to; the latent-space schedulers it replaces never do
    clip_sample = scheduler.config.get("clip_sample", False)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=clip_sample)


def check_scheduler_name(kind: str) -> None:
    """Raise `InvalidSchedule` unless `sampling_scheduler` accepts schedulers of this class."""
    if kind not in (*_SAMPLED, *_REBUILT):
        raise InvalidSchedule(
            f"{kind} is not supported: Stable Diffusion is sampled with DDIM, or in few steps with "
            "LCM or TCD. To sample its noise schedule with DDIM, use "
            "DDIMScheduler.from_config(scheduler.config) as the pipeline's scheduler "
            "(from_pretrained takes scheduler=)"
        )


def sampling_levels(
    scheduler: Any,  # noqa: ANN401 - a `SamplingScheduler`
    objectives: Mapping[str, Objective],
    etas: Mapping[str, float] | Sequence[float] | None,
) -> list[float] | None:
    """Return the level of each objective, (M,), in the scheduler's own kind; None: it has none.

    An objective's eta is DDIM's. TCD's gamma is another quantity, .3 for all unless the call says
    otherwise, and LCM has nothing to choose.

    Args:
        scheduler: Of the pipeline.
        objectives: By name, in order.
        etas: Of the call, in order or by name; a mapping overrides the objectives that it names.

    Raises:
        UnknownObjective: A mapping names an unknown objective.
        InvalidSchedule: A level is outside its range, or an objective has noise of flow models.
        InvalidShape: The numbers are not of shape (M,).
    """
    check_no_flow(objectives)
    if isinstance(scheduler, TCDScheduler):
        return by_name("etas", objectives, etas, [_GAMMA] * len(objectives))
    if isinstance(scheduler, LCMScheduler):
        return None if etas is None else by_name("etas", objectives, etas, [1.0] * len(objectives))
    return objective_etas(objectives, etas)

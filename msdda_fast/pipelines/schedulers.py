# SPDX-License-Identifier: Apache-2.0
"""Which schedulers of diffusers Stable Diffusion is sampled with."""

from __future__ import annotations

import logging
from typing import Any

from diffusers import DDIMParallelScheduler, DDIMScheduler

from msdda_fast.errors import InvalidSchedule

__all__ = ["check_scheduler_name", "ddim_scheduler"]

logger = logging.getLogger(__name__)

_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
#: What folders of Stable Diffusion name as their scheduler, and means the same noise schedule.
_REBUILT = ("PNDMScheduler", "DDPMScheduler")


def ddim_scheduler(scheduler: Any) -> DDIMScheduler:  # noqa: ANN401 - any diffusers scheduler
    """Return a DDIM scheduler with the noise schedule of `scheduler`, which is not changed.

    A DDIM scheduler is returned unchanged. PNDM and DDPM, which Stable Diffusion folders name, have
    the same noise schedule: they are rebuilt as DDIM, and a warning is logged.

    Raises:
        InvalidSchedule: A scheduler of another kind, which would not sample as its name says.
    """
    if isinstance(scheduler, (DDIMScheduler, DDIMParallelScheduler)):
        return scheduler
    kind = type(scheduler).__name__
    check_scheduler_name(kind)
    logger.warning("%s is not DDIM: sampling with DDIMScheduler.from_config", kind)
    # DDIM clips unless told not to; the latent-space schedulers it replaces never do
    clip_sample = scheduler.config.get("clip_sample", False)
    return DDIMScheduler.from_config(scheduler.config, clip_sample=clip_sample)


def check_scheduler_name(kind: str) -> None:
    """Raise `InvalidSchedule` unless `ddim_scheduler` accepts schedulers of this class."""
    if kind not in (*_DDIM, *_REBUILT):
        raise InvalidSchedule(
            f"{kind} is not supported: Stable Diffusion is sampled with DDIM only. To sample its "
            "noise schedule with DDIM, use DDIMScheduler.from_config(scheduler.config) as the "
            "pipeline's scheduler (from_pretrained takes scheduler=)"
        )

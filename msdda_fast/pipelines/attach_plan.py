# SPDX-License-Identifier: Apache-2.0
"""Gives a stock pipeline the objectives whose files were planned."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from msdda_fast.pipelines.accelerator import few_step_scheduler
from msdda_fast.pipelines.attach import WithObjectives, attach
from msdda_fast.pipelines.attach_files import load_objectives
from msdda_fast.pipelines.loading import LoadPlan

__all__ = ["attach_plan"]


def attach_plan(pipeline: DiffusionPipeline, plan: LoadPlan) -> WithObjectives:
    """`attach`, with the adapters that were planned; an accelerator may change the scheduler.

    Raises:
        AdapterMismatch: An adapter was made for another base; names the first such module.
        InvalidAdapter: A file is damaged, or holds something other than plain LoRA.
    """
    sets = load_objectives(pipeline, plan)
    if (accelerator := plan.accelerator) is not None and plan.switches_scheduler:
        pipeline.register_modules(scheduler=few_step_scheduler(pipeline.scheduler, accelerator))
    return attach(pipeline, plan.objectives, sets, plan.accelerator)

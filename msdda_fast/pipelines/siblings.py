# SPDX-License-Identifier: Apache-2.0
"""The pipeline that does another task with the networks and objectives of a given one."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Literal, TypeAlias

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.attach import WithObjectives, attach
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["TASKS", "Task", "own_tasks", "sibling"]

#: From a text; from a text and an image; likewise, where a mask says.
Task: TypeAlias = Literal["text", "image", "inpaint"]
TASKS: dict[Task, str] = {
    "text": "draws from a text alone",
    "image": "starts from an image",
    "inpaint": "repaints parts of an image",
}


#: Input channels of denoisers that diffusers' inpainting runs, where it finds that out in its loop.
_INPAINTS = {"StableDiffusion3InpaintPipeline": (16, 33)}


def own_tasks(pipe: Any) -> set[Task]:  # noqa: ANN401 - any pipeline of diffusers
    """Return the tasks that the call of a pipeline does itself."""
    if isinstance(pipe, MSDDAPipeline):
        return {"text"}
    arguments = inspect.signature(pipe.__call__).parameters
    if "mask_image" in arguments:
        return {"inpaint"}
    if "image" not in arguments:
        return {"text"}
    from diffusers.pipelines import auto_pipeline  # which imports every pipeline there is

    name = type(pipe).__name__
    texts = [auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING]
    texts.append(getattr(auto_pipeline, "AUTO_TEXT2VIDEO_PIPELINES_MAPPING", {}))
    optional = any(kind.__name__ == name for one in texts for kind in one.values())
    return {"image", "text"} if optional else {"image"}


def sibling(pipe: Any, task: Task) -> WithObjectives:  # noqa: ANN401 - a pipeline with objectives
    """Return diffusers' pipeline for a task, with the same networks, objectives and adapters.

    Args:
        pipe: With objectives, of any class; it is not changed.
        task: Which its class does not do.

    Raises:
        UnsupportedNetwork: Diffusers has none of this family, or it needs more networks, or an
            objective is not a set of adapters.
    """
    from diffusers.pipelines import auto_pipeline  # which imports every pipeline there is

    stock, sets = _stock(pipe, task)
    name = type(stock).__name__
    kinds: dict[Task, Any] = {
        "text": auto_pipeline.AutoPipelineForText2Image,
        "image": auto_pipeline.AutoPipelineForImage2Image,
        "inpaint": auto_pipeline.AutoPipelineForInpainting,
    }
    try:
        made = kinds[task].from_pipe(stock)
    except ValueError as error:  # of no class, or of missing networks, in diffusers' words
        raise UnsupportedNetwork(
            f"diffusers has no pipeline for {name} that {TASKS[task]} ({error})"
        ) from error
    runs = _INPAINTS.get(type(made).__name__)
    if runs is not None and (channels := made.transformer.config.in_channels) not in runs:
        raise UnsupportedNetwork(
            f"diffusers' {type(made).__name__} runs transformers of {runs[0]} or {runs[1]} "
            f"channels only, and this one has {channels}"
        )
    try:
        return attach(made, pipe.objectives, sets)
    except ValueError as error:
        raise UnsupportedNetwork(f"no pipeline that {TASKS[task]}: {error}") from error


def _stock(pipe: Any, task: Task) -> tuple[DiffusionPipeline, dict[str, Any]]:  # noqa: ANN401
    """The pipeline without objectives, with a scheduler of its own, and their adapters."""
    if isinstance(pipe, WithObjectives):
        stock, sets = pipe.detach(), pipe.adapter_sets
        # past `__setattr__`, which would note the change in the config; constructors edit it
        stock.__dict__["scheduler"] = copy.deepcopy(stock.scheduler)
        return stock, sets
    for name, variant in pipe.variants.items():
        if variant.network is not pipe.unet:
            raise UnsupportedNetwork(
                f"no pipeline that {TASKS[task]}: objective {name!r} is a network of its own"
            )
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    adapters = {
        name: () if variant.adapter is None else ((variant.adapter, variant.scale),)
        for name, variant in pipe.variants.items()
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False), adapters

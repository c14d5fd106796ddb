# SPDX-License-Identifier: Apache-2.0
"""Image to image and inpainting with the networks and objectives of a loaded pipeline.

diffusers has a class for each task of a family, and a table of them (`AutoPipelineFor...`). A class
that takes images itself, as FLUX Kontext and image to video do, is its own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, StableDiffusionPipeline
from diffusers.pipelines import auto_pipeline

from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.attach import WithObjectives, attach
from msdda_fast.pipelines.loading import STABLE_DIFFUSION
from msdda_fast.pipelines.manifest import NAMELESS

__all__ = ["Task", "check_from_text", "for_task", "shared_guidance", "task_class"]

#: What is drawn from, beside the prompt: an image, or an image and a mask of what is repainted.
Task = Literal["image-to-image", "inpaint"]

_IMAGES: dict[Task, Mapping[str, Any]] = {
    "image-to-image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    "inpaint": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
}
_MAKERS: dict[Task, Any] = {
    "image-to-image": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}
_NEEDS: dict[Task, set[str]] = {"image-to-image": {"image"}, "inpaint": {"image", "mask_image"}}
_TEXTS = (
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    auto_pipeline.AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
)
#: Channels of the transformers that a class inpaints with, where only its loop says so.
_CHANNELS = {"StableDiffusion3InpaintPipeline": (16, 33)}
#: Images that no task gives, and parts that need them.
_MORE = {"control_image", "control_video"}
_CONTROLS = {"controlnet", "adapter"}


def check_from_text(kind: type) -> None:
    """Check that a class of pipelines can draw from a prompt alone.

    Raises:
        UnsupportedNetwork: It needs an image, too.
    """
    if (_CONTROLS & _arguments(kind)) | (_MORE & _arguments(kind.__call__)):
        raise UnsupportedNetwork(f"{kind.__name__} needs a control image; call it in Python")
    named = any(kind.__name__ == text.__name__ for table in _TEXTS for text in table.values())
    if "image" in _arguments(kind.__call__) and not named:
        raise UnsupportedNetwork(f"{kind.__name__} starts from an image, and none is given")


def task_class(kind: type, task: Task) -> type:
    """Return the class of diffusers that does `task` with the components of the class `kind`.

    Args:
        kind: Of a stock pipeline, or `MSDDAPipeline`.
        task: What to do.

    Raises:
        UnsupportedNetwork: diffusers has none, or it needs more images than the task has.
    """
    name = StableDiffusionPipeline.__name__ if kind.__name__ in STABLE_DIFFUSION else kind.__name__
    model = next(
        (
            model
            for table in (auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, *_IMAGES.values())
            for model, listed in table.items()
            if listed.__name__ == name
        ),
        None,
    )
    found: type | None = _IMAGES[task].get(model) if model is not None else None
    if found is None and not _CONTROLS & _arguments(kind):
        found = kind if _takes(kind, task) else None
    if found is None:
        raise UnsupportedNetwork(
            f"{name} cannot do {task}: diffusers has no such pipeline for its components"
        )
    if more := _MORE & _arguments(found.__call__):
        raise UnsupportedNetwork(
            f"{name} cannot do {task} with an image alone: {found.__name__} needs "
            f"{', '.join(sorted(more))} as well; call it in Python"
        )
    return found


def for_task(pipe: Any, task: Task) -> Any:  # noqa: ANN401 - a pipeline with objectives, of a class
    """Return a pipeline for `task` on the networks of `pipe`, with the same objectives.

    It is of the stock class of that task, whose arguments `image`, `mask_image` (white is
    repainted) and `strength` it takes, besides those of `WithObjectives`; `pipe` itself, where that
    takes them. It has a scheduler of its own, nothing is loaded or copied, and it runs in the same
    processes. Its call guides all objectives alike: where they had guidance of their own, give it
    `shared_guidance(pipe)`.

    Args:
        pipe: A pipeline with objectives: `MSDDAPipeline`, or of a stock class (`attach`).
        task: "image-to-image" or "inpaint".

    Raises:
        UnsupportedNetwork: The family lacks such a pipeline; the message names the class.
        ValueError: An objective is a network of its own, or objectives differ in guidance, which
            only Stable Diffusion's text to image can have.
    """
    stock = pipe.stock_class if isinstance(pipe, WithObjectives) else StableDiffusionPipeline
    wanted = task_class(stock, task)
    if wanted is stock:
        return pipe
    channels, runs = _channels(pipe), _CHANNELS.get(wanted.__name__)
    if runs is not None and channels not in runs:
        raise UnsupportedNetwork(
            f"{stock.__name__} cannot do {task}: {wanted.__name__} runs transformers of "
            f"{' or '.join(map(str, runs))} channels, and this one has {channels}"
        )
    scheduler = copy.deepcopy(pipe.scheduler)  # construction may edit its config
    source = pipe if isinstance(pipe, WithObjectives) else _stock(pipe)
    made = _MAKERS[task].from_pipe(source, scheduler=scheduler)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    objectives = pipe.objectives
    if shared_guidance(pipe) is not None:
        objectives = {name: replace(one, guidance_scale=None) for name, one in objectives.items()}
    attached = attach(made, objectives, _sets(pipe), pipe.accelerator)
    if pipe.parallel is not None:
        attached.enable_parallel(pipe.parallel)
    return attached


def shared_guidance(pipe: Any) -> float | None:  # noqa: ANN401 - as `for_task`
    """Return the guidance that all objectives have of their own; None: none, or they differ."""
    scales = {objective.guidance_scale for objective in pipe.objectives.values()}
    return scales.pop() if len(scales) == 1 else None


def _stock(pipe: Any) -> StableDiffusionPipeline:  # noqa: ANN401 - an MSDDAPipeline
    """The stock text to image pipeline on the same components, which diffusers' table knows."""
    stock = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    asked = pipe.config.get("requires_safety_checker", True) and stock.safety_checker is not None
    stock.register_to_config(requires_safety_checker=asked)
    return stock


def _sets(pipe: Any) -> dict[str, AdapterSet]:  # noqa: ANN401 - as above
    """The adapters of each objective, and of the base, by `NAMELESS`."""
    if isinstance(pipe, WithObjectives):
        return {**pipe.adapter_sets, NAMELESS: pipe.base_set}
    return {
        name: () if variant.adapter is None else ((variant.adapter, float(variant.scale)),)
        for name, variant in {**pipe.variants, NAMELESS: pipe.base_variant}.items()
    }


def _channels(pipe: Any) -> int | None:  # noqa: ANN401 - as above
    transformer = pipe.components.get("transformer")
    return None if transformer is None else transformer.config.get("in_channels")


def _takes(kind: Any, task: Task) -> bool:  # noqa: ANN401 - a class
    given = _arguments(kind.__call__)
    return given >= _NEEDS[task] and ("mask_image" in given) == (task == "inpaint")


def _arguments(function: Any) -> set[str]:  # noqa: ANN401 - a function or class
    return set(inspect.signature(function).parameters)

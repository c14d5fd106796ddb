# SPDX-License-Identifier: Apache-2.0
"""Builds a pipeline from names: the model and the adapters of each network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from torch import nn

from msdda_fast.adapters.files import AdapterFile
from msdda_fast.adapters.formats import Format, StableDiffusionFormat
from msdda_fast.adapters.injection import peft_names
from msdda_fast.adapters.sources import adapter_files, hub_options, locate, model_file
from msdda_fast.adapters.variant import Variant
from msdda_fast.files import read_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import (
    OWN,
    Accelerator,
    few_step_scheduler,
    find_accelerator,
    guided,
    joined_accelerator,
)
from msdda_fast.pipelines.adapter_sets import adapter_scale
from msdda_fast.pipelines.dtypes import Dtypes, cast, check_dtypes
from msdda_fast.pipelines.manifest import (
    NAMELESS,
    OBJECTIVES_FILE,
    check_names,
    parse_objectives,
)
from msdda_fast.pipelines.runnable import check_own_network
from msdda_fast.pipelines.scheduler_config import check_scheduler_file
from msdda_fast.pipelines.schedulers import check_scheduler_name

__all__ = [
    "STABLE_DIFFUSION",
    "LoadPlan",
    "attach",
    "plan",
    "read_adapters",
    "variants_of",
]

#: Classes of pipelines that Stable Diffusion 1 and 2 are saved as.
STABLE_DIFFUSION = ("StableDiffusionPipeline", "MSDDAPipeline")
_BASE = {"base": Objective.base()}
#: Options of `DiffusionPipeline.from_pretrained` with which the result would be another pipeline.
_UNSUPPORTED = {
    "dduf_file": "a DDUF archive has no place for objectives; unpack it and load the folder",
    "custom_pipeline": "MSDDAPipeline is the pipeline",
}


class HoldsObjectives(Protocol):
    """The parts of a Stable Diffusion pipeline that loading needs."""

    unet: UNet2DConditionModel | None
    text_encoder: nn.Module | None
    scheduler: Any

    @property
    def components(self) -> Mapping[str, Any]:
        """Modules by name."""

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The network and the active adapter of each objective."""

    def register_modules(self, **modules: Any) -> None:  # noqa: ANN401 - of diffusers
        """Replace components."""

    def set_objectives(
        self,
        objectives: Mapping[str, Objective],
        variants: Mapping[str, Variant],
        accelerator: Accelerator | None = None,
        base: Variant | None = None,
    ) -> None:
        """Replace the objectives with others whose networks and adapters are already loaded."""


P = TypeVar("P", bound=HoldsObjectives)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What `from_pretrained` will load, with names, files and dtype checked.

    Attributes:
        model: Local folder or hub id of the base.
        kind: Name of its class.
        options: Arguments of `DiffusionPipeline.from_pretrained`.
        dtype: Dtype of all components, or by component.
        objectives: Objectives by name, in order.
        adapters: Adapter files by objective; of the accelerator, by `NAMELESS`.
        accelerator: What all objectives and the base have in common, if anything.
        joins: Whether the accelerator is yet to join the objectives; saved ones include it.
    """

    model: str
    kind: str
    options: dict[str, Any]
    dtype: Dtypes
    objectives: dict[str, Objective]
    adapters: dict[str, list[Path]]
    accelerator: Accelerator | None
    joins: bool

    @property
    def switches_scheduler(self) -> bool:
        """Whether the scheduler becomes the one that the accelerator was made for."""
        return self.joins and "scheduler" not in self.options


def plan(
    model: str | Path,
    objectives: Mapping[str, Objective] | None,
    dtype: Dtypes | None,
    torch_dtype: Dtypes | None,
    accelerator: str | Path | None,
    options: Mapping[str, Any],
) -> LoadPlan:
    """Check whatever can be checked before loading starts; arguments as in `from_pretrained`."""
    for name, reason in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}= is not supported: {reason}")
    place = locate(model)
    index = model_file(place, "model_index.json", options)
    if index is None:
        raise FileNotFoundError(f"{place} is not a diffusers pipeline: it has no model_index.json")
    listed = read_json(index, "a diffusers pipeline's index")
    kind = str(listed.get("_class_name"))
    ours = kind in STABLE_DIFFUSION
    if "scheduler" not in options and listed.get("scheduler") != [None, None]:
        if ours:
            check_scheduler_name(_class_name(index, listed.get("scheduler")))
        if file := model_file(place, "scheduler/scheduler_config.json", options, required=False):
            check_scheduler_file(file)
    has_unet = not ours or options.get("unet", listed.get("unet", [None])[-1]) is not None
    if not has_unet and objectives is not None:
        raise ValueError("without a unet (None), a pipeline encodes prompts and has no objectives")
    parts = [name for name, entry in listed.items() if isinstance(entry, list)]
    dtype = check_dtypes(dtype, torch_dtype, parts) or torch.float32
    has_all, own = None, objectives is not None  # an accelerator; the caller's own objectives
    if not has_unet:
        objectives = _BASE
    elif objectives is None:
        manifest = model_file(place, OBJECTIVES_FILE, options, required=False)
        objectives = parse_objectives(manifest.read_bytes(), place) if manifest else _BASE
        has_all = joined_accelerator(manifest, place) if manifest else None
    check_names(objectives)
    if accelerator is None or (accelerator == OWN and has_all is not None):
        chosen = has_all
    elif has_all is not None:
        raise ValueError(f"accelerator={accelerator!r}: the objectives of {place} include one")
    else:
        chosen = find_accelerator(accelerator, place, options)
    if chosen is not None and ours:
        objectives = guided(objectives, chosen, keep=own)
    return LoadPlan(
        model=str(place),
        kind=kind,
        options={"dtype": dtype, "low_cpu_mem_usage": is_accelerate_available(), **options},
        dtype=dtype,
        objectives=dict(objectives),
        adapters={
            name: adapter_files(objective, hub_options(options))
            for name, objective in _sources(objectives, chosen).items()
            if objective.source is not None
        },
        accelerator=chosen,
        joins=chosen is not None and has_all is None,
    )


def _sources(
    objectives: Mapping[str, Objective], accelerator: Accelerator | None
) -> dict[str, Objective]:
    if accelerator is None:
        return dict(objectives)
    return {**objectives, NAMELESS: accelerator.as_objective()}


def read_adapters(
    plan: LoadPlan, kind: Format, networks: Mapping[str, nn.Module | None], *, join: bool = False
) -> list[AdapterFile]:
    """Read and check the adapter of each objective; several that act together become one.

    Args:
        plan: What to read.
        kind, networks: Of the pipeline.
        join: Make the accelerator a part of the other adapters.

    Raises:
        AdapterMismatch, InvalidAdapter: See `AdapterFile`.
    """
    found = []
    read = {
        name: [AdapterFile.read(name or "accelerator", file, kind) for file in files]
        for name, files in plan.adapters.items()
    }
    for part in chain(*read.values()):
        part.check(networks)
    for name, parts in read.items():
        scales = (1.0,) if name == NAMELESS else plan.objectives[name].scales
        if join and name != NAMELESS:
            parts, scales = [*read[NAMELESS], *parts], (1.0, *scales)
        one = replace(parts[0], name=name)
        found.append(one if len(parts) == 1 else AdapterFile.together(name, parts, scales))
    return found


def _class_name(index: Path, component: Any) -> str:  # noqa: ANN401 - of a stranger's JSON
    if isinstance(component, list) and len(component) == 2 and isinstance(component[1], str):
        return component[1]
    raise ValueError(f"{index} must name the scheduler's library and class, got {component!r:.80}")


def attach(pipe: P, plan: LoadPlan) -> P:
    """Put the planned adapters and networks into a loaded pipeline, after checking all of them."""
    if pipe.unet is None:
        cast(pipe, plan.dtype)
        return pipe
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapters = read_adapters(plan, StableDiffusionFormat(pipe.unet), networks, join=plan.joins)
    objectives = {
        name: replace(objective, unet=_network(name, objective, plan))
        for name, objective in plan.objectives.items()
    }
    names = peft_names(plan.adapters, pipe.unet, pipe.text_encoder)
    base = None
    if plan.accelerator is not None:
        base = Variant(pipe.unet, names[NAMELESS])
        if plan.switches_scheduler:
            scheduler = few_step_scheduler(pipe.scheduler, plan.accelerator)
            pipe.register_modules(scheduler=scheduler)
    variants = variants_of(pipe.unet, objectives, names, base)
    for adapter in adapters:
        adapter.put_into(networks, names[adapter.name])
    pipe.set_objectives(objectives, variants, plan.accelerator, base)
    cast(pipe, plan.dtype)
    return pipe


def _network(name: str, objective: Objective, plan: LoadPlan) -> Any:  # noqa: ANN401 - as the field
    if not isinstance(objective.unet, (str, Path)):
        return objective.unet
    place = str(locate(objective.unet))
    return UNet2DConditionModel.from_pretrained(
        place,
        subfolder=objective.subfolder,
        low_cpu_mem_usage=plan.options["low_cpu_mem_usage"],
        **hub_options(plan.options),
    )


def variants_of(
    unet: UNet2DConditionModel,
    objectives: Mapping[str, Objective],
    adapters: Mapping[str, str],
    base: Variant | None,
) -> dict[str, Variant]:
    """Variants by objective; `base` is the base with an accelerator, which the adapters include."""
    variants = {}
    for name, objective in objectives.items():
        if (own := objective.unet) is not None:
            if base is not None:
                raise ValueError(
                    f"objective {name!r} is a network of its own, which an accelerator for the "
                    "model's cannot join"
                )
            check_own_network(name, own, unet)
        variants[name] = Variant(
            unet if own is None else own,
            adapters.get(name, None if base is None else base.adapter),
            adapter_scale(objective) if base is None else 1.0,
            as_it_is=own is not None and own is not unet,
        )
    return variants

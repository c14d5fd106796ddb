# SPDX-License-Identifier: Apache-2.0
"""Builds a pipeline from names: the model and the adapters of each network."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import is_accelerate_available
from torch import nn

from msdda_fast.adapters.files import AdapterFile
from msdda_fast.adapters.formats import Format, StableDiffusionFormat
from msdda_fast.adapters.injection import peft_names
from msdda_fast.adapters.layers import check_can_switch
from msdda_fast.adapters.sources import adapter_files, fetch, hub_options, locate
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import UnknownObjective
from msdda_fast.files import read_json
from msdda_fast.objective import Objective
from msdda_fast.pipelines.adapter_sets import adapter_scale
from msdda_fast.pipelines.carried_over import carried_over
from msdda_fast.pipelines.dtypes import Dtypes, cast, check_dtypes
from msdda_fast.pipelines.manifest import OBJECTIVES_FILE, check_names, parse_objectives
from msdda_fast.pipelines.runnable import check_own_network
from msdda_fast.pipelines.scheduler_config import check_scheduler_file
from msdda_fast.pipelines.schedulers import check_scheduler_name

__all__ = [
    "STABLE_DIFFUSION",
    "LoadPlan",
    "attach",
    "attach_loaded",
    "plan",
    "read_adapters",
    "shared_components",
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

    @property
    def components(self) -> Mapping[str, Any]:
        """Modules by name."""

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The network and the active adapter of each objective."""

    def set_objectives(
        self, objectives: Mapping[str, Objective], variants: Mapping[str, Variant]
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
        adapters: Adapter files by objective.
    """

    model: str
    kind: str
    options: dict[str, Any]
    dtype: Dtypes
    objectives: dict[str, Objective]
    adapters: dict[str, list[Path]]


def plan(
    model: str | Path,
    objectives: Mapping[str, Objective] | None,
    dtype: Dtypes | None,
    torch_dtype: Dtypes | None,
    options: Mapping[str, Any],
) -> LoadPlan:
    """Check whatever can be checked before loading starts; arguments as in `from_pretrained`."""
    for name, reason in _UNSUPPORTED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}= is not supported: {reason}")
    place = locate(model)
    index = _model_file(place, "model_index.json", options)
    if index is None:
        raise FileNotFoundError(f"{place} is not a diffusers pipeline: it has no model_index.json")
    listed = read_json(index, "a diffusers pipeline's index")
    kind = str(listed.get("_class_name"))
    ours = kind in STABLE_DIFFUSION
    if "scheduler" not in options and listed.get("scheduler") != [None, None]:
        if ours:
            check_scheduler_name(_class_name(index, listed.get("scheduler")))
        if file := _model_file(place, "scheduler/scheduler_config.json", options, required=False):
            check_scheduler_file(file)
    has_unet = not ours or options.get("unet", listed.get("unet", [None])[-1]) is not None
    if not has_unet and objectives is not None:
        raise ValueError("without a unet (None), a pipeline encodes prompts and has no objectives")
    parts = [name for name, entry in listed.items() if isinstance(entry, list)]
    dtype = check_dtypes(dtype, torch_dtype, parts) or torch.float32
    if not has_unet:
        objectives = _BASE
    elif objectives is None:
        manifest = _model_file(place, OBJECTIVES_FILE, options, required=False)
        objectives = parse_objectives(manifest.read_bytes(), place) if manifest else _BASE
    check_names(objectives)
    return LoadPlan(
        model=str(place),
        kind=kind,
        options={"dtype": dtype, "low_cpu_mem_usage": is_accelerate_available(), **options},
        dtype=dtype,
        objectives=dict(objectives),
        adapters={
            name: adapter_files(objective, hub_options(options))
            for name, objective in objectives.items()
            if objective.source is not None
        },
    )


def read_adapters(
    plan: LoadPlan, kind: Format, networks: Mapping[str, nn.Module | None]
) -> list[AdapterFile]:
    """Read and check the adapter of each objective; several that act together become one.

    Raises:
        AdapterMismatch, InvalidAdapter: See `AdapterFile`.
    """
    found = []
    for name, files in plan.adapters.items():
        parts = [AdapterFile.read(name, file, kind) for file in files]
        for part in parts:
            part.check(networks)
        scales = plan.objectives[name].scales
        found.append(parts[0] if len(parts) == 1 else AdapterFile.together(name, parts, scales))
    return found


def _class_name(index: Path, component: Any) -> str:  # noqa: ANN401 - of a stranger's JSON
    if isinstance(component, list) and len(component) == 2 and isinstance(component[1], str):
        return component[1]
    raise ValueError(f"{index} must name the scheduler's library and class, got {component!r:.80}")


def _model_file(
    place: Path | str, name: str, options: Mapping[str, Any], *, required: bool = True
) -> Path | None:
    if isinstance(place, Path):
        return place / name if (place / name).is_file() else None
    revision = {"revision": options["revision"]} if "revision" in options else {}
    return fetch(place, name, {**hub_options(options), **revision}, required=required)


def attach(pipe: P, plan: LoadPlan) -> P:
    """Put the planned adapters and networks into a loaded pipeline, after checking all of them."""
    if pipe.unet is None:
        cast(pipe, plan.dtype)
        return pipe
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    adapters = read_adapters(plan, StableDiffusionFormat(pipe.unet), networks)
    objectives = {
        name: replace(objective, unet=_network(name, objective, plan))
        for name, objective in plan.objectives.items()
    }
    names = peft_names(plan.adapters, pipe.unet, pipe.text_encoder)
    variants = _variants(pipe.unet, objectives, names)
    for adapter in adapters:
        adapter.put_into(networks, names[adapter.name])
    pipe.set_objectives(objectives, variants)
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


def _variants(
    unet: UNet2DConditionModel, objectives: Mapping[str, Objective], adapters: Mapping[str, str]
) -> dict[str, Variant]:
    variants = {}
    for name, objective in objectives.items():
        if (own := objective.unet) is not None:
            check_own_network(name, own, unet)
        variants[name] = Variant(
            unet if own is None else own,
            adapters.get(name),
            adapter_scale(objective),
            as_it_is=own is not None and own is not unet,
        )
    return variants


def shared_components(pipeline: DiffusionPipeline, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Stable Diffusion modules of `pipeline`, with `replaced` in place of its own."""
    modules = {**pipeline.components, **replaced}
    names = [
        name
        for name in inspect.signature(StableDiffusionPipeline.__init__).parameters
        if name not in ("self", "requires_safety_checker")
    ]
    modules["scheduler"] = copy.deepcopy(modules["scheduler"])  # construction may edit its config
    optional = StableDiffusionPipeline._optional_components
    missing = [name for name in names if name not in (*modules, *optional)]
    unknown = [name for name in modules if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{type(pipeline).__name__} does not have the modules of a StableDiffusionPipeline "
            f"(missing: {missing}, unknown: {unknown})"
        )
    return {name: modules.get(name) for name in names}


def attach_loaded(
    pipe: P, source: DiffusionPipeline, objectives: Mapping[str, Objective] | None
) -> P:
    """Make objectives from the adapters already loaded; see `MSDDAPipeline.from_pipe`."""
    if pipe.unet is None:
        if objectives is not None:
            raise ValueError(
                "without a unet (None), a pipeline encodes prompts and has no objectives"
            )
        return pipe
    loaded = adapter_names(pipe.unet, pipe.text_encoder)
    kept: dict[str, Variant] = {}
    if objectives is None:
        objectives, kept = carried_over(source, pipe.unet, loaded)
    check_names(objectives)
    adapters = {}
    for name, objective in objectives.items():
        if objective.unet is not None or name in kept:
            continue
        if len(objective.sources) > 1:
            raise ValueError(
                f"objective {name!r} is of several adapters, which become one when they are read: "
                f"give their files to from_pretrained"
            )
        if objective.source is not None and str(objective.source) not in loaded:
            raise UnknownObjective(
                f"objective {name!r}: {str(objective.source)!r} is not an adapter of this "
                f"pipeline; loaded: {', '.join(loaded) or 'none'}. Load one with "
                f"load_lora_weights(..., adapter_name={name!r}), or use from_pretrained"
            )
        if objective.source is not None:
            adapters[name] = str(objective.source)
        elif name in loaded:
            adapters[name] = name
    chosen = {name: objective for name, objective in objectives.items() if name not in kept}
    variants = {**kept, **_variants(pipe.unet, chosen, adapters)}
    for variant in variants.values():
        check_can_switch(variant)
    pipe.set_objectives(objectives, variants)
    return pipe

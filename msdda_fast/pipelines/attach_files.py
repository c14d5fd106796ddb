# SPDX-License-Identifier: Apache-2.0
"""Loads and saves the objectives of any stock pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from msdda_fast.adapters.formats import StockFormat
from msdda_fast.adapters.injection import peft_names
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.adapters.writing import write_adapters
from msdda_fast.pipelines.accelerator import ACCELERATOR_FOLDER
from msdda_fast.pipelines.adapter_sets import adapter_scale
from msdda_fast.pipelines.loading import LoadPlan, read_adapters
from msdda_fast.pipelines.manifest import NAMELESS, OBJECTIVES_FILE, dump_objectives
from msdda_fast.pipelines.saving import folders_of, load_in_float32, staged, without_adapters

__all__ = ["DENOISERS", "load_objectives", "loaded_adapters", "networks_of", "save_objectives"]

#: Components that predict what a scheduler's step takes.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


def networks_of(pipeline: Any) -> dict[str, nn.Module]:  # noqa: ANN401 - any pipeline
    """Return the networks of a pipeline by name, denoisers first."""
    networks = {
        name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    return dict(sorted(networks.items(), key=lambda item: item[0] not in DENOISERS))


def loaded_adapters(pipeline: Any) -> list[str]:  # noqa: ANN401 - any pipeline
    """Return the names of the adapters in its networks."""
    return adapter_names(*networks_of(pipeline).values())


def load_objectives(pipeline: DiffusionPipeline, plan: LoadPlan) -> dict[str, AdapterSet]:
    """Put the planned adapters into a loaded pipeline; return the adapter set of each objective.

    The base's is there, too, by `NAMELESS`.

    Raises:
        AdapterMismatch: An adapter was made for another base; names the first such module.
        InvalidAdapter: A file is damaged, or holds something other than plain LoRA.
    """
    networks = networks_of(pipeline)
    config = getattr(networks.get("unet"), "config", None)
    adapters = read_adapters(plan, StockFormat(type(pipeline), tuple(networks), config), networks)
    names = peft_names(plan.adapters, *networks.values())
    for adapter in adapters:
        adapter.put_into(networks, names[adapter.name])
    base: AdapterSet = ((names[NAMELESS], 1.0),) if plan.accelerator is not None else ()
    sets = {NAMELESS: base}
    for name, objective in plan.objectives.items():
        includes_base = bool(base) and not plan.joins  # as it was saved, scale and all
        scale = 1.0 if includes_base else adapter_scale(objective)
        own: AdapterSet = ((names[name], scale),) if name in names else ()
        sets[name] = own if includes_base and own else (*base, *own)
    return sets


def save_objectives(pipeline: Any, folder: Path, **options: Any) -> None:  # noqa: ANN401
    """Write a folder of the stock class, with the objectives beside it; see `saving.save`."""
    with staged(folder) as stage:
        stock = pipeline.detach()
        networks = networks_of(pipeline)
        for name, network in networks.items():
            if (bare := without_adapters(network)) is not network:
                stock.__dict__[name] = bare
        stock.__dict__["scheduler"] = copy.deepcopy(pipeline.scheduler)
        stock.save_pretrained(stage, **options)
        load_in_float32(stage)
        places = {}
        folders = folders_of(pipeline.objectives)
        for name, adapters in pipeline.adapter_sets.items():
            if adapters and adapters != pipeline.base_set:
                places[name] = f"objectives/{folders[name]}"
                write_adapters(networks, adapters, stage / places[name])
        entry = None
        if pipeline.accelerator is not None:
            write_adapters(networks, pipeline.base_set, stage / ACCELERATOR_FOLDER)
            entry = pipeline.accelerator.to_json(ACCELERATOR_FOLDER)
        text = dump_objectives(pipeline.objectives, places, entry)
        (stage / OBJECTIVES_FILE).write_text(text, "utf-8")

# SPDX-License-Identifier: Apache-2.0
"""Makes objectives of the adapters that a pipeline already holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from diffusers import DiffusionPipeline

from msdda_fast.adapters.layers import check_can_switch
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import UnknownObjective
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import guided
from msdda_fast.pipelines.carried_over import accelerated, carried_over
from msdda_fast.pipelines.loading import HoldsObjectives, variants_of
from msdda_fast.pipelines.manifest import check_names

__all__ = ["attach_loaded"]

P = TypeVar("P", bound=HoldsObjectives)


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
    accelerator, base = accelerated(source, pipe.unet, adapters)
    if accelerator is not None:
        objectives = guided(objectives, accelerator, keep=True)
    variants = {**kept, **variants_of(pipe.unet, chosen, adapters, base)}
    for variant in variants.values():
        check_can_switch(variant)
    pipe.set_objectives(objectives, variants, accelerator, base)
    return pipe

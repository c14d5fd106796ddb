# SPDX-License-Identifier: Apache-2.0
"""What a pipeline made from another takes over: modules, accelerator, and its objectives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import Accelerator

__all__ = ["accelerated", "carried_over", "shared_components"]

_BASE = {"base": Objective.base()}


def carried_over(
    source: Any,  # noqa: ANN401 - a pipeline of any class
    unet: Any,  # noqa: ANN401 - a network
    loaded: Sequence[str],
) -> tuple[dict[str, Objective], dict[str, Variant]]:
    """Return objectives, and the variants of those that the source has itself.

    Its own whose adapters are still there come first, then the adapters loaded into it since. A
    lone base model gives way to them: nobody chose it. Without objectives of its own, every loaded
    adapter is one; without adapters, the base model is the only one.

    Args:
        source: The pipeline whose modules are shared.
        unet: The new pipeline's UNet; the source's own objectives are of its own UNet.
        loaded: Adapters of the new pipeline.

    Raises:
        AdapterMismatch: An adapter loaded since has the name of an objective.
    """
    own = getattr(source, "objectives", {}) if unet is source.unet else {}
    if not own:
        return {name: Objective(name) for name in loaded} or dict(_BASE), {}
    new = source.unused_adapters()
    if new and own == _BASE:
        own = {}
    variants = {
        name: variant
        for name, variant in source.variants.items()
        if name in own and (variant.adapter is None or variant.adapter in loaded)
    }
    if taken := [name for name in new if name in variants]:
        raise AdapterMismatch(
            f"adapter {taken[0]!r} has the name of an objective: give objectives= to choose"
        )
    kept = {name: own[name] for name in variants}
    return {**kept, **{name: Objective(name) for name in new}} or dict(_BASE), variants


def accelerated(
    source: Any,  # noqa: ANN401 - a pipeline of any class
    unet: Any,  # noqa: ANN401 - a network
    adapters: Mapping[str, str],
) -> tuple[Accelerator | None, Variant | None]:
    """Return the accelerator of the source and the base with it; None: it has none.

    Args:
        source: The pipeline whose modules are shared.
        unet: The new pipeline's UNet.
        adapters: Adapters in it by objective, which must include the accelerator.

    Raises:
        AdapterMismatch: An adapter was loaded since, without the accelerator.
    """
    accelerator = getattr(source, "accelerator", None) if unet is source.unet else None
    if accelerator is None:
        return None, None
    base = source.base_variant
    joined = {base.adapter, *(variant.adapter for variant in source.variants.values())}
    for name, adapter in adapters.items():
        if adapter not in joined:
            raise AdapterMismatch(
                f"objective {name!r}: {adapter!r} was loaded without the accelerator "
                f"{str(accelerator.source)!r} that the others include; give it to from_pretrained "
                "with accelerator="
            )
    return accelerator, base


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

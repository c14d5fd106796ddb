# SPDX-License-Identifier: Apache-2.0
"""The adapters of each objective of a stock pipeline, by their names in peft."""

from __future__ import annotations

from collections.abc import Sequence

from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.errors import AdapterMismatch, UnknownObjective
from msdda_fast.objective import Objective

__all__ = ["adapter_scale", "adapter_set", "check_loaded", "check_objective"]


def check_objective(name: str, objective: Objective) -> None:
    """Raise `ValueError` for what only Stable Diffusion's own pipeline can run."""
    if objective.unet is not None:
        raise ValueError(
            f"objective {name!r} is a network of its own, which only Stable Diffusion 1 and 2 can "
            "have; here objectives are adapters"
        )
    if objective.guidance_scale is not None:
        raise ValueError(
            f"objective {name!r} has a guidance_scale of its own, but the pipeline's loop guides "
            "all objectives alike: give guidance_scale in the call"
        )


def adapter_scale(objective: Objective) -> float:
    """Return the factor on an objective's one adapter; several were scaled when they became one."""
    if len(objective.sources) > 1:
        return 1.0
    return objective.scale[0] if isinstance(objective.scale, Sequence) else objective.scale


def adapter_set(name: str, objective: Objective, loaded: Sequence[str]) -> AdapterSet:
    """Return the adapters that an objective's sources name.

    Args:
        name: Of the objective, for messages.
        objective: Its sources are names of adapters; without any, it may be named as one itself.
        loaded: All adapters of the pipeline.

    Raises:
        UnknownObjective: A source is none of them.
    """
    if not objective.sources and name in loaded:
        return ((name, float(adapter_scale(objective))),)
    for source in objective.sources:
        if str(source) not in loaded:
            raise UnknownObjective(
                f"objective {name!r}: {str(source)!r} is not an adapter of this pipeline; loaded: "
                f"{', '.join(loaded) or 'none'}. Load one with load_lora_weights(..., "
                f"adapter_name={name!r}), or use from_pretrained"
            )
    pairs = zip(objective.sources, objective.scales, strict=True)
    return tuple((str(source), float(scale)) for source, scale in pairs)


def check_loaded(name: str, adapters: AdapterSet, loaded: Sequence[str]) -> None:
    """Raise `AdapterMismatch` if an adapter of an objective has gone."""
    for adapter, _ in adapters:
        if adapter not in loaded:
            raise AdapterMismatch(
                f"objective {name!r}: its adapter {adapter!r} is no longer in the pipeline; "
                f"loaded: {', '.join(loaded) or 'none'}"
            )

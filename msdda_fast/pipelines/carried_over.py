# SPDX-License-Identifier: Apache-2.0
"""The objectives of a pipeline made from another when none are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch
from msdda_fast.objective import Objective

__all__ = ["carried_over"]

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

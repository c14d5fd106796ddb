# SPDX-License-Identifier: Apache-2.0
"""A loaded network as one objective."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import UNet2DConditionModel

__all__ = ["AdapterSet", "Variant"]

#: The adapters of one objective: names in peft, and factors on their updates, no unit.
AdapterSet = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """A network as one objective: with `adapter` active at `scale`; None: without an adapter.

    A variant `as_it_is` is a network of the objective's own: its adapters are left as they are,
    active, disabled or fused, instead of being switched.
    """

    network: UNet2DConditionModel
    adapter: str | None
    scale: float = 1.0
    as_it_is: bool = False

# SPDX-License-Identifier: Apache-2.0
"""Whether a pipeline's networks still hold the adapters of its objectives, and no others.

Objectives switch adapters themselves. What diffusers' own methods do to them after the objectives
were set would have no effect, or another one than asked for, so the next call refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from msdda_fast.adapters.layers import can_scale
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch

__all__ = ["HeldAdapters"]

#: (active adapters, whether disabled, scales) of the first layer that peft changed.
_Activation: TypeAlias = tuple[list[str], bool, dict[str, float]]


@dataclass
class HeldAdapters:
    """The adapters of a pipeline's networks, as they were when its objectives were set.

    Attributes:
        parts: By objective, the parts ("unet", "text_encoder") that held its adapter.
        spare: Adapters that need not be objectives; None: any, because the networks are shared with
            a pipeline that may load and activate what it likes.
        activation: Networks and which of their adapters were active; empty if they are shared.
    """

    parts: Mapping[str, Sequence[str]]
    spare: frozenset[str] | None
    activation: list[tuple[nn.Module, _Activation]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        variants: Mapping[str, Variant],
        text_encoder: nn.Module | None,
        spare: frozenset[str] | None,
    ) -> HeldAdapters:
        """Return what the networks hold now."""
        parts = {
            name: [
                part
                for part, network in _networks(variant, text_encoder)
                if variant.adapter in adapter_names(network)
            ]
            for name, variant in variants.items()
            if variant.adapter is not None
        }
        return cls(parts, spare)

    def watch(self, networks: Iterable[nn.Module | None]) -> None:
        """Remember which adapters are active in the networks now."""
        self.activation = [
            (network, found)
            for network in networks
            if network is not None and (found := _activation(network)) is not None
        ]

    def check(self, variants: Mapping[str, Variant], text_encoder: nn.Module | None) -> None:
        """Check that every objective's adapter is there, and that no others were loaded.

        Raises:
            AdapterMismatch: One is missing, or one was loaded that is no objective.
        """
        for name, parts in self.parts.items():
            variant = variants[name]
            for part, network in _networks(variant, text_encoder):
                if part in parts and variant.adapter not in adapter_names(network):
                    raise AdapterMismatch(
                        f"objective {name!r}: its adapter {variant.adapter!r} is not in the "
                        f"pipeline's {part} any more; load it again with load_lora_weights(..., "
                        f"adapter_name={variant.adapter!r}), or choose other objectives with "
                        "from_pipe(pipe, objectives=...)"
                    )
        if unused := self.unused(variants, text_encoder):
            raise AdapterMismatch(
                f"adapter {unused[0]!r} was loaded but is no objective, so it has no effect: "
                "from_pipe(pipe) gives a pipeline with it as an objective, and "
                f"delete_adapters({unused[0]!r}) removes it"
            )

    def unused(self, variants: Mapping[str, Variant], text_encoder: nn.Module | None) -> list[str]:
        """Return adapters that are no objective and were not there when objectives were set."""
        if self.spare is None:
            return []
        known = {*self.spare, *(variant.adapter for variant in variants.values())}
        switched = [v.network for v in variants.values() if not v.as_it_is]
        return [
            adapter
            for network in dict.fromkeys([*switched, text_encoder])
            for adapter in adapter_names(network)
            if adapter not in known and not _is_fused(network, adapter)
        ]

    def check_activation(self, networks: Sequence[nn.Module | None]) -> None:
        """Check that nobody activated, scaled or disabled adapters in networks still in use.

        Raises:
            AdapterMismatch: Somebody did, by set_adapters() or disable_lora() of a network.
        """
        self.activation = [entry for entry in self.activation if entry[0] in networks]
        for network, then in self.activation:
            now = _activation(network)
            if now is not None and now != then:
                words = ("active", "disabled", "scales")
                was, found = (
                    ", ".join(f"{w}={v}" for w, v in zip(words, state, strict=True))
                    for state in (then, now)
                )
                raise AdapterMismatch(
                    f"adapters of {type(network).__name__} were activated, scaled or disabled "
                    f"({found}; before: {was}), which would have no effect: objectives run with "
                    "their own adapter each. Use weights= or Objective(scale=...), and undo this"
                )


def _networks(
    variant: Variant, text_encoder: nn.Module | None
) -> tuple[tuple[str, nn.Module | None], ...]:
    return (("unet", variant.network), ("text_encoder", text_encoder))


def _activation(network: Any) -> _Activation | None:  # noqa: ANN401 - a network or None
    if not adapter_names(network):
        return None
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            if layer.merged:
                return None
            scaling = dict(layer.scaling) if can_scale(layer) else {}
            return list(layer.active_adapters), layer.disable_adapters, scaling
    return None


def _is_fused(network: Any, adapter: str) -> bool:  # noqa: ANN401 - a network or None
    return any(
        isinstance(layer, BaseTunerLayer) and adapter in layer.merged_adapters
        for layer in network.modules()
    )

# SPDX-License-Identifier: Apache-2.0
"""Detects changes to a network since it was read; cheap enough to run before every request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from msdda_fast.adapters.layers import own_modules, running
from msdda_fast.adapters.variant import Variant
from msdda_fast.torch_private import held_by, hooks_of, versions_of

__all__ = ["AdapterState", "NetworkState", "scaling"]

#: Attributes that the batched forward does not depend on: it drops nothing, and has adapters of its
#: own. Hooks of diffusers, which are noted in the last one, replace forwards.
_IRRELEVANT = {
    *("training", "_active_adapter", "_disable_adapters", "merged_adapters"),
    "_diffusers_hook",
}
_ABSENT = object()


class _Place(NamedTuple):
    """Where an object was found: `holder[name] is item`."""

    holder: MutableMapping[str, Any]
    name: str
    item: object


class _Attributes(NamedTuple):
    """What a module is and holds beside its parts: patched forwards, processors, numbers."""

    now: dict[str, Any]
    then: dict[str, Any]
    module: nn.Module
    kind: type[nn.Module]


class _Adapter(NamedTuple):
    """The adapter of one variant: its layers in order, and how each scales it."""

    variant: Variant
    layers: list[LoraLayer]
    scales: list[float]


class NetworkState:
    """A snapshot of a network and the adapters of some variants, to compare with later.

    The tree is walked once. `is_current` compares every module, parameter and buffer by identity,
    the class and attributes of every module and whether it has hooks (patched forwards, attention
    processors and FreeU among them), base weights by address, version and four of their numbers (a
    write through `.data` does not raise the version; one that misses these four goes unnoticed),
    and adapters by all numbers, because peft's hotswap writes that way: two syncs per network.
    Adapters that no variant uses may be added and removed, and activated unless a variant runs the
    network as it is.

    Args:
        network: Holds the adapters of all variants.
        variants: One per objective, all of `network`.
    """

    def __init__(self, network: nn.Module, variants: Iterable[Variant]) -> None:
        variants = list(variants)
        modules = [module for _, module in own_modules(network)]
        self._forwards = _Forwards(modules)
        self._sizes = [(holder, len(holder)) for holder in _holders(modules)]
        self._places = [
            _Place(holder, name, item)
            for holder in _holders(modules)
            for name, item in holder.items()
        ]
        self._weights = [place.item for place in self._places if isinstance(place.item, Tensor)]
        self._addresses = [weight.data_ptr() for weight in self._weights]
        self._versions = versions_of(self._weights)
        self._samples = [_sample(weight) for weight in self._weights]
        self._sampled = _together(self._samples)
        self._tuners = [layer for layer in modules if isinstance(layer, BaseTunerLayer)]
        for layer in self._tuners:
            self._places.append(_Place(held_by(layer)[0], "base_layer", layer.base_layer))
        self._merged = [list(layer.merged_adapters) for layer in self._tuners]
        self._as_it_is = any(variant.as_it_is for variant in variants)
        self._running = [running(layer) for layer in self._tuners]
        self._adapters = AdapterState(self._tuners, variants)

    def is_current(self) -> bool:
        """Return whether nothing has changed since this was made."""
        for holder, size in self._sizes:
            if len(holder) != size:
                return False
        if not _in_place(self._places):
            return False
        if [weight.data_ptr() for weight in self._weights] != self._addresses:
            return False
        if versions_of(self._weights) != self._versions:
            return False
        if not self._forwards.are_current():
            return False
        if [layer.merged_adapters for layer in self._tuners] != self._merged:
            return False
        if self._as_it_is and [running(layer) for layer in self._tuners] != self._running:
            return False
        if not torch.equal(_together(self._samples), self._sampled):
            return False
        return self._adapters.is_current()


class AdapterState:
    """A snapshot of the LoRA adapters of some variants, to compare with later.

    Args:
        layers: The peft layers of a network.
        variants: Of that network, whatever their networks are said to be.
    """

    def __init__(self, layers: Iterable[BaseTunerLayer], variants: Iterable[Variant]) -> None:
        self._layers = list(layers)
        self._forwards = _Forwards(())
        self._places: list[_Place] = []
        self._adapters: list[_Adapter] = []
        self._factors: list[Tensor] = []
        for variant in variants:
            if variant.adapter is not None:
                self._watch(variant, variant.adapter)
        self._memory = [factor.detach() for factor in self._factors]
        self._numbers = _together(self._memory)

    def is_current(self) -> bool:
        """Return whether factors and scales are still the same numbers."""
        if not _in_place(self._places) or not self._forwards.are_current():
            return False
        for variant, layers, scales in self._adapters:
            if [scaling(layer, variant) for layer in layers] != scales:
                return False
        for factor, memory in zip(self._factors, self._memory, strict=True):
            if factor.data_ptr() != memory.data_ptr():  # `.data` was replaced
                return False
        return torch.equal(_together(self._memory), self._numbers)

    def _watch(self, variant: Variant, name: str) -> None:
        layers = []
        for layer in self._layers:
            for side in ("lora_A", "lora_B"):
                parts = held_by(getattr(layer, side))[0] if hasattr(layer, side) else {}
                part = parts.get(name)
                self._places.append(_Place(parts, name, part))  # None: no such adapter there
                if part is not None:
                    self._forwards.watch([part])
                    parameters = held_by(part)[1]
                    self._places.append(_Place(parameters, "weight", part.weight))
                    self._factors.append(part.weight)
            if name in getattr(layer, "lora_A", {}):
                layers.append(layer)
        scales = [scaling(layer, variant) for layer in layers]
        self._adapters.append(_Adapter(variant, layers, scales))


class _Forwards:
    """What modules do when they are called: their classes, attributes and hooks."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._attributes: list[_Attributes] = []
        self._hooks: list[dict[Any, Any]] = []
        self.watch(modules)

    def watch(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            held = vars(module)
            self._attributes.append(_Attributes(held, {**held}, module, type(module)))
            self._hooks.extend(hooks_of(module))

    def are_current(self) -> bool:
        return not any(self._hooks) and not any(_differ(one) for one in self._attributes)


def _in_place(places: Iterable[_Place]) -> bool:
    return all(holder.get(name) is item for holder, name, item in places)


def _differ(attributes: _Attributes) -> bool:
    now, then, module, kind = attributes
    if type(module) is not kind:
        return True
    try:
        if now == then:  # mostly by identity: a microsecond
            return False
    except (RuntimeError, ValueError):  # tensors and arrays have no single truth
        return True
    names = (now.keys() | then.keys()) - _IRRELEVANT
    return any(now.get(name, _ABSENT) != then.get(name, _ABSENT) for name in names)


def _holders(modules: Iterable[nn.Module]) -> Iterator[MutableMapping[str, Any]]:
    """Yield the dictionaries in which modules hold children, parameters and buffers."""
    for module in modules:
        children, parameters, buffers = held_by(module)
        if not isinstance(module, BaseTunerLayer):
            yield children
        yield parameters
        yield buffers


def _sample(weight: Tensor) -> Tensor:
    """Return a view of four numbers (fewer of small weights) all over a weight of any layout."""
    step, offset = max(1, weight.numel() // 4), weight.storage_offset()
    return weight.detach().as_strided((min(4, weight.numel()),), (step,), offset)


def _together(factors: list[Tensor]) -> Tensor:
    return torch.cat([factor.flatten() for factor in factors]) if factors else torch.empty(0)


def scaling(layer: LoraLayer, variant: Variant) -> float:
    """Return the factor s of B A that `AdapterSwitch.select` would set, whatever is set now."""
    now = layer.scaling[variant.adapter]
    layer.set_scale(variant.adapter, variant.scale)
    scale = float(layer.scaling[variant.adapter])
    layer.scaling[variant.adapter] = now
    return scale

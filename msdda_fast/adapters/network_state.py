# SPDX-License-Identifier: Apache-2.0
"""Detects changes to a network since it was read; cheap enough to run before every request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from msdda_fast.adapters.variant import Variant
from msdda_fast.torch_private import held_by, version_of

__all__ = ["NetworkState", "scaling"]


class _Place(NamedTuple):
    """Where an object was found: `holder[name] is item`."""

    holder: MutableMapping[str, Any]
    name: str
    item: object


class _Weight(NamedTuple):
    """A weight of the base; in-place changes increment its version."""

    tensor: Tensor
    address: int
    version: int


class _Adapter(NamedTuple):
    """The adapter of one variant: its layers in order, and all of its numbers."""

    variant: Variant
    layers: list[LoraLayer]
    factors: list[Tensor]
    numbers: Tensor
    scales: list[float]


class NetworkState:
    """A snapshot of a network and the adapters of some variants, to compare with later.

    The tree is walked once. `is_current` compares every module, parameter and buffer by identity,
    base weights by address and version (which a write through `.data` does not raise), and adapters
    by their numbers, because peft's hotswap writes that way: one sync per objective. Adapters that
    no variant uses may be added and removed.

    Args:
        network: Holds the adapters of all variants.
        variants: One per objective, all of `network`.
    """

    def __init__(self, network: nn.Module, variants: Iterable[Variant]) -> None:
        modules = list(_own_modules(network))
        self._sizes = [(holder, len(holder)) for holder in _holders(modules)]
        self._places = [
            _Place(holder, name, item)
            for holder in _holders(modules)
            for name, item in holder.items()
        ]
        self._places += [
            _Place(held_by(layer)[0], "base_layer", layer.base_layer)
            for layer in modules
            if isinstance(layer, BaseTunerLayer)
        ]
        tensors = (place.item for place in self._places if isinstance(place.item, Tensor))
        self._weights = [_Weight(t, t.data_ptr(), version_of(t)) for t in tensors]
        self._tuners = [layer for layer in modules if isinstance(layer, BaseTunerLayer)]
        self._adapters = [self._adapter(variant) for variant in variants]

    def is_current(self) -> bool:
        """Return whether nothing has changed since this was made."""
        for holder, size in self._sizes:
            if len(holder) != size:
                return False
        for holder, name, item in self._places:
            if holder.get(name) is not item:
                return False
        for tensor, address, version in self._weights:
            if tensor.data_ptr() != address or version_of(tensor) != version:
                return False
        if any(layer.merged_adapters for layer in self._tuners):
            return False
        return all(self._is_same(adapter) for adapter in self._adapters)

    def _adapter(self, variant: Variant) -> _Adapter:
        name = variant.adapter
        layers = [layer for layer in self._tuners if name in getattr(layer, "lora_A", {})]
        factors = _factors(layers, name)
        return _Adapter(variant, layers, factors, _flat(factors), _scales(layers, variant))

    def _is_same(self, adapter: _Adapter) -> bool:
        name = adapter.variant.adapter
        if name is None:
            return True
        now = [layer for layer in self._tuners if name in getattr(layer, "lora_A", {})]
        if now != adapter.layers or _scales(now, adapter.variant) != adapter.scales:
            return False
        factors = _factors(now, name)
        return len(factors) == len(adapter.factors) and torch.equal(_flat(factors), adapter.numbers)


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module and all its descendants, without the parts that peft adds to a layer."""
    yield module
    children: Iterable[nn.Module | None] = held_by(module)[0].values()
    if isinstance(module, BaseTunerLayer):
        base: nn.Module = module.get_base_layer()
        children = [base]
    for child in children:
        if child is not None:
            yield from _own_modules(child)


def _holders(modules: Iterable[nn.Module]) -> Iterator[MutableMapping[str, Any]]:
    """Yield the dictionaries in which modules hold children, parameters and buffers."""
    for module in modules:
        children, parameters, buffers = held_by(module)
        if not isinstance(module, BaseTunerLayer):
            yield children
        yield parameters
        yield buffers


def _factors(layers: Iterable[LoraLayer], name: str | None) -> list[Tensor]:
    return [
        factor[name].weight.detach() for layer in layers for factor in (layer.lora_A, layer.lora_B)
    ]


def _flat(factors: list[Tensor]) -> Tensor:
    return torch.cat([factor.flatten() for factor in factors]) if factors else torch.empty(0)


def _scales(layers: Iterable[LoraLayer], variant: Variant) -> list[float]:
    return [scaling(layer, variant) for layer in layers]


def scaling(layer: LoraLayer, variant: Variant) -> float:
    """Return the factor s of B A that `AdapterSwitch.select` would set, whatever is set now."""
    now = layer.scaling[variant.adapter]
    layer.set_scale(variant.adapter, variant.scale)
    scale = float(layer.scaling[variant.adapter])
    layer.scaling[variant.adapter] = now
    return scale

# SPDX-License-Identifier: Apache-2.0
"""The peft layers of any network, run for M objectives at once.

An objective is a set of adapters with scales; the empty set is the base. The rows of every layer's
input are objective-major, (M R, ...): the base layer runs once on all of them, and each adapter on
the rows of its objective. A plain LoRA of a linear layer costs two batched products whatever M and
the number of adapters, since the factors of a set are concatenated; everything else that peft knows
(convolutions, embeddings, DoRA, LoKr, ...) runs objective by objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from msdda_fast.adapters.layers import holds
from msdda_fast.adapters.network_state import AdapterState, scaling
from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.adapters.variant import AdapterSet, Variant
from msdda_fast.errors import AdapterMismatch, InvalidShape
from msdda_fast.kernels.grouped_lora import add_updates

__all__ = ["GroupedAdapters", "tuner_layers"]


def tuner_layers(network: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """Return the paths and layers that hold adapters, in the network's order."""
    return [
        (path, module)
        for path, module in network.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


class GroupedAdapters:
    """The adapters of M objectives in one network, applied to objective-major rows.

    Args:
        network: Any network with or without peft layers.
        sets: The adapters of each objective, M >= 1.

    Raises:
        AdapterMismatch: An adapter is not in the network, or adapters are merged into its weights.
    """

    def __init__(self, network: nn.Module, sets: Sequence[AdapterSet]) -> None:
        layers = tuner_layers(network)
        for path, layer in layers:
            if layer.merged:
                raise AdapterMismatch(
                    f"adapters {layer.merged_adapters} are fused into the weights of {path!r}; "
                    "call unfuse_lora() first"
                )
        self._forwards = [(layer, _forward_of(layer, path, sets)) for path, layer in layers]
        used = dict.fromkeys(entry for adapters in sets for entry in adapters)
        variants = [Variant(network, *entry) for entry in used]
        self._network = network
        self._state = AdapterState([layer for _, layer in layers], variants)

    def is_current(self) -> bool:
        """Return whether the network's adapters and their scales are still those that were read."""
        layers = [layer for _, layer in tuner_layers(self._network)]
        known = [layer for layer, _ in self._forwards]
        return (
            len(layers) == len(known)
            and all(now is then for now, then in zip(layers, known, strict=True))
            and not any(layer.merged for layer in layers)
            and self._state.is_current()
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network run for all objectives inside this context."""
        for layer, forward in self._forwards:
            # on the instance: the layer stays where hooks, offloading and `named_modules` find it
            layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.__dict__["forward"]


def _forward_of(
    layer: BaseTunerLayer, path: str, sets: Sequence[AdapterSet]
) -> Callable[..., Tensor]:
    own = [
        tuple((name, scale) for name, scale in adapters if holds(layer, name)) for adapters in sets
    ]
    if not any(own):
        base: nn.Module = layer.get_base_layer()
        return base.__call__
    if any(not _is_plain(layer, name) for adapters in own for name, _ in adapters):
        return _OneByOne(layer, path, own)
    if isinstance(layer.get_base_layer(), nn.Linear):
        return _GroupedLinear(layer, path, own)
    return _PlainUpdates(layer, path, own)


def _is_plain(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether the adapter adds B(A(x)) s and nothing else."""
    return (
        isinstance(layer, LoraLayer)
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and not layer.lora_bias.get(adapter, False)
    )


class _OneByOne:
    """Any adapters: peft's own forward on the rows of each objective."""

    def __init__(self, layer: BaseTunerLayer, path: str, sets: Sequence[AdapterSet]) -> None:
        self._layer, self._path, self._sets = layer, path, sets

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        parts = _split(x, len(self._sets), self._path)
        forward = type(self._layer).forward
        outputs = []
        with AdapterSwitch([self._layer]) as switch:
            for part, adapters in zip(parts, self._sets, strict=True):
                switch.select_set(adapters)
                outputs.append(forward(self._layer, part, *args, **kwargs))
        return torch.cat(outputs)


class _PlainUpdates:
    """Plain LoRA of a convolution or the like: the base once, then B(A(x)) s by objective."""

    def __init__(self, layer: LoraLayer, path: str, sets: Sequence[AdapterSet]) -> None:
        self._layer, self._path = layer, path
        self._parts = [[_plain(layer, *entry) for entry in adapters] for adapters in sets]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        y: Tensor = self._layer.get_base_layer()(x, *args, **kwargs)
        rows = _split(x, len(self._parts), self._path)
        outputs = list(y.chunk(len(self._parts)))
        for m, adapters in enumerate(self._parts):
            for down, up, scale in adapters:
                update = up(down(rows[m].to(down.weight.dtype))) * scale
                outputs[m] = outputs[m] + update.to(y.dtype)
        return torch.cat(outputs)


def _plain(layer: LoraLayer, name: str, scale: float) -> tuple[Any, Any, float]:
    """A and B, modules of the kind of the layer, and s of an adapter."""
    return layer.lora_A[name], layer.lora_B[name], scaling(layer, Variant(layer, name, scale))


class _GroupedLinear:
    """Plain LoRA of a linear layer: the base once, then two batched products."""

    def __init__(self, layer: LoraLayer, path: str, sets: Sequence[AdapterSet]) -> None:
        self._layer, self._path = layer, path
        downs, ups = zip(*(_concatenated(layer, adapters) for adapters in sets), strict=True)
        rank = max(len(down) for down in downs)
        self._down = torch.stack([_padded(down, rank) for down in downs])  # (M, R, C)
        self._up = torch.stack([_padded(up, rank) for up in ups]).mT  # (M, N, R)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        y: Tensor = self._layer.get_base_layer()(x, *args, **kwargs)
        count = len(self._down)
        if len(x) % count:
            raise _no_rows(x, count, self._path)
        if self._down.device != y.device or self._down.dtype != y.dtype:
            # networks move between calls when they are offloaded, and may be cast
            self._down, self._up = self._down.to(y), self._up.to(y)
        flat = y.reshape(count, -1, y.shape[-1])
        add_updates(flat, x.reshape(count, -1, x.shape[-1]).to(y.dtype), self._down, self._up)
        return flat.view(y.shape)


def _concatenated(layer: LoraLayer, adapters: AdapterSet) -> tuple[Tensor, Tensor]:
    """The factors of a set: A (R, C) and s B^T (R, N), R the sum of its ranks; float32 or wider."""
    linear = layer.get_base_layer()
    device = linear.weight.device
    downs = [torch.zeros(0, linear.in_features, device=device)]
    ups = [torch.zeros(0, linear.out_features, device=device)]
    for name, scale in adapters:
        down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        wide = torch.promote_types(down.dtype, torch.float32)
        downs.append(down.to(wide))
        ups.append(up.mT.to(wide) * scaling(layer, Variant(layer, name, scale)))
    return torch.cat(downs), torch.cat(ups)


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, 0, 0, rank - len(factor)))


def _split(x: Tensor, count: int, path: str) -> Sequence[Tensor]:
    if len(x) % count:
        raise _no_rows(x, count, path)
    return x.chunk(count)


def _no_rows(x: Tensor, count: int, path: str) -> InvalidShape:
    return InvalidShape(
        f"{path!r} got an input of shape {tuple(x.shape)}, whose first axis is not the rows of "
        f"{count} objectives"
    )

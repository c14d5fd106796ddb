# SPDX-License-Identifier: Apache-2.0
"""One peft layer with the adapters of M objectives, each on its own rows of the input.

A site keeps the factors of plain LoRA in tensors of its own. Other adapters of the same shapes are
copied into them: their addresses are in captured graphs, and compiled code knows them by shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from msdda_fast.adapters.layers import holds
from msdda_fast.adapters.network_state import scaling
from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.adapters.variant import AdapterSet, Variant
from msdda_fast.errors import InvalidShape
from msdda_fast.kernels.grouped_lora import add_updates
from msdda_fast.torch_private import conv_forward

__all__ = ["Site", "site_of"]

#: Others hold weights that are cast, or unpacked, before they are multiplied.
_COMPUTE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Site(ABC):
    """What a layer runs in place of its own forward: x (M R, ...) -> (M R, ...).

    Attributes:
        base: The layer without adapters.
        factors: Tensors that hold numbers of adapters, at fixed addresses between calls.
    """

    def __init__(self, layer: BaseTunerLayer) -> None:
        self.base: nn.Module = layer.get_base_layer()
        self.factors: list[Tensor] = []

    @abstractmethod
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        """Run the layer.

        Raises:
            InvalidShape: The first axis of `x` is not the rows of M objectives.
        """

    def fits(self, other: Site) -> bool:
        """Whether this can run as `other` with the numbers of other's adapters."""
        kinds = [[(f.shape, f.dtype, f.device) for f in site.factors] for site in (self, other)]
        return type(self) is type(other) and self.base is other.base and kinds[0] == kinds[1]

    @torch.no_grad()
    def take(self, other: Site) -> None:
        """Copy the adapters of a site that `fits`."""
        for own, new in zip(self.factors, other.factors, strict=True):
            own.copy_(new)


def site_of(layer: BaseTunerLayer, path: str, sets: Sequence[AdapterSet]) -> Site:
    """Return the site of a layer.

    Args:
        layer: Of peft.
        path: Its name in messages.
        sets: The adapters of each objective, M >= 1; those that it does not hold are passed over.
    """
    own = [
        tuple((name, scale) for name, scale in adapters if holds(layer, name)) for adapters in sets
    ]
    if not any(own):
        return _Untouched(layer)
    if all(_is_plain(layer, name) for adapters in own for name, _ in adapters):
        if isinstance(layer.get_base_layer(), nn.Linear):
            return _Linear(layer, path, own)
        if isinstance(layer.get_base_layer(), nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return _Convolution(layer, path, own)
    return _OneByOne(layer, path, own)


def _is_plain(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether the adapter adds B(A(x)) s and nothing else."""
    return (
        isinstance(layer, LoraLayer)
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and not layer.lora_bias.get(adapter, False)
    )


class _Untouched(Site):
    """No objective has an adapter here."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        y: Tensor = self.base(x, *args, **kwargs)
        return y


class _OneByOne(Site):
    """Any adapters: peft's own forward on the rows of each objective."""

    def __init__(self, layer: BaseTunerLayer, path: str, sets: Sequence[AdapterSet]) -> None:
        super().__init__(layer)
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

    def fits(self, other: Site) -> bool:
        """Never: what peft's layer holds is not known to be of the same kind."""
        return False


class _Convolution(Site):
    """Plain LoRA of a convolution: the base once, then B(A(x)) s by objective."""

    def __init__(self, layer: LoraLayer, path: str, sets: Sequence[AdapterSet]) -> None:
        super().__init__(layer)
        self._path = path
        # they know strides and padding; their weights are not read
        self._kinds = [
            [(layer.lora_A[name], layer.lora_B[name]) for name, _ in adapters] for adapters in sets
        ]
        for name, scale in (entry for adapters in sets for entry in adapters):
            down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            self.factors += [down.clone(), up * scaling(layer, Variant(layer, name, scale))]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        y: Tensor = self.base(x, *args, **kwargs)
        rows = _split(x, len(self._kinds), self._path)
        outputs = list(y.chunk(len(self._kinds)))
        if self.factors[0].device != y.device:  # networks move when they are offloaded
            self.factors = [factor.to(y.device) for factor in self.factors]
        factors = iter(self.factors)
        for m, kinds in enumerate(self._kinds):
            for down, up in kinds:
                a, b = next(factors), next(factors)
                update = conv_forward(up, conv_forward(down, rows[m].to(a.dtype), a), b)
                outputs[m] = outputs[m] + update.to(y.dtype)
        return torch.cat(outputs)


class _Linear(Site):
    """Plain LoRA of a linear layer: the base once, then two batched products."""

    def __init__(self, layer: LoraLayer, path: str, sets: Sequence[AdapterSet]) -> None:
        super().__init__(layer)
        self._path = path
        downs, ups = zip(*(_concatenated(layer, adapters) for adapters in sets), strict=True)
        rank = max(len(down) for down in downs)
        down = torch.stack([_padded(down, rank) for down in downs])  # (M, R, C)
        up = torch.stack([_padded(up, rank) for up in ups])  # (M, R, N)
        stored = layer.get_base_layer().weight.dtype
        dtype = stored if stored in _COMPUTE else down.dtype  # else of the outputs, once seen
        self.factors = [down.to(dtype), up.to(dtype)]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - peft's
        y: Tensor = self.base(x, *args, **kwargs)
        down, up = self.factors
        if down.device != y.device or down.dtype != y.dtype:
            # networks move between calls when they are offloaded, and may be cast
            down, up = self.factors = [down.to(y), up.to(y)]
        count = len(down)
        if len(x) % count:
            raise _no_rows(x, count, self._path)
        flat = y.reshape(count, -1, y.shape[-1])
        add_updates(flat, x.reshape(count, -1, x.shape[-1]).to(y.dtype), down, up.mT)
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

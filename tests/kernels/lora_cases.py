# SPDX-License-Identifier: Apache-2.0
"""Layers with M adapters of mixed ranks, and each objective's LoRA computed on its own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class LoraCase(NamedTuple):
    """A linear or convolution layer and its adapters, padded to one rank; the scale is in `up`."""

    base: nn.Linear | nn.Conv2d
    down: Tensor  # (M, R, C, *k)
    up: Tensor  # (M, N, R, *1)

    def double(self) -> "LoraCase":
        """The same numbers in float64."""
        layer = type(self.base).__new__(type(self.base))
        layer.__dict__.update(self.base.__dict__)
        layer._parameters = {
            name: value if value is None else nn.Parameter(value.double(), requires_grad=False)
            for name, value in self.base._parameters.items()
        }
        return LoraCase(layer, self.down.double(), self.up.double())


def lora_case(
    base: nn.Linear | nn.Conv2d,
    ranks: tuple[int, ...],
    dtype: torch.dtype,
    *,
    scales: tuple[float, ...] | None = None,
    pad: int | None = None,
) -> LoraCase:
    """Random weights; adapter m has rank `ranks[m]` (0: none) and factor `scales[m]`.

    At scale 1 the update is half as large as the output of the base.
    """
    generator = torch.Generator().manual_seed(sum(ranks) + len(ranks))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, *inner = base.weight.shape
    fan_in = base.weight[0].numel()
    rank = max(*ranks, 1) if pad is None else pad
    down = torch.zeros(len(ranks), rank, *inner, dtype=torch.float64)
    up = torch.zeros(len(ranks), n, rank, *(1 for _ in inner[1:]), dtype=torch.float64)
    for m, r in enumerate(ranks):
        scale = 0.5 if scales is None else 0.5 * scales[m]
        down[m, :r] = normal(r, *inner) / fan_in**0.5
        up[m, :, :r] = scale * normal(n, r, *up.shape[3:]) / max(r, 1) ** 0.5
    with torch.no_grad():
        base.weight.copy_(normal(*base.weight.shape) / fan_in**0.5)
        if base.bias is not None:
            base.bias.copy_(normal(n))
    base = base.to(dtype).requires_grad_(False)
    return LoraCase(base, down.to(dtype), up.to(dtype))


def rows(case: LoraCase, *lead: int, dtype: torch.dtype) -> Tensor:
    """Activations (*lead, C) for a linear layer, or (lead[0], C, *lead[1:]) for a convolution."""
    generator = torch.Generator().manual_seed(len(lead))
    channels = case.base.weight.shape[1]
    convolution = isinstance(case.base, nn.Conv2d)
    shape = (lead[0], channels, *lead[1:]) if convolution else (*lead, channels)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def one_by_one(case: LoraCase, x: Tensor) -> Tensor:
    """The base and its adapter, objective after objective, in the dtype of the inputs."""
    outputs = []
    for part, down, up in zip(x.chunk(len(case.down)), case.down, case.up, strict=True):
        if isinstance(case.base, nn.Conv2d):
            base = case.base
            low = functional.conv2d(part, down, None, base.stride, base.padding, base.dilation)
            outputs.append(base(part) + functional.conv2d(low, up))
        else:
            outputs.append(case.base(part) + functional.linear(functional.linear(part, down), up))
    return torch.cat(outputs)

# SPDX-License-Identifier: Apache-2.0
"""Outputs of all objectives for less than one forward of each, and how wrong they may be.

Both ways run exactly every `REFRESH` calls, and compare what they would have said with what is
right. That difference, kept, is the estimated error of the calls until the next.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msdda_fast.pipeline.batched_unet import BatchedUNet
from msdda_fast.pipeline.merged_unet import MergedUNet
from msdda_fast.pipeline.split_unet import SplitUNet

__all__ = ["REFRESH", "Approximation", "Guess", "Merged", "Staggered"]

#: Calls from one exact refresh to the next.
REFRESH = 8


class Guess(NamedTuple):
    """Raw outputs, and an estimate of what is missing to the exact ones; (M, K, B, C, h, w)."""

    outputs: Tensor
    errors: Tensor


class Approximation(Protocol):
    """Stands in for the batched network of M objectives, for the length of one generation."""

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor, shares: Tensor) -> None:
        """Take the prompts (M or 1, K, B, L, D) and shares (B, M) of the next calls."""

    def __call__(self, x: Tensor, k: Tensor) -> Guess:
        """The outputs at step k, 0-d int64, of latents (B, C, h, w)."""


class Staggered:
    """Deep features are kept, and those of one objective are renewed per call, in turn.

    A call runs the shallow layers of all objectives and the deep layers of one: always the same
    shapes, one set of operators per renewed objective. The first two calls renew all.

    The error of stale features is taken to grow in proportion to their age.

    Args:
        network: Of M objectives.

    Raises:
        UnsupportedNetwork: See `SplitUNet`.
    """

    def __init__(self, network: BatchedUNet) -> None:
        self._split = SplitUNet(network)
        self._calls = 0
        self._kept: list[Tensor] = []  # by objective, (K B, C, h, w)
        self._ages = [0] * self._split.count
        self._rate: Tensor | None = None  # error per call of age, (M, K, B, C, h, w)

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor, shares: Tensor) -> None:
        """See `Approximation.begin`; the shares play no part."""
        self._split.begin(prompt_embeds, timesteps)

    def __call__(self, x: Tensor, k: Tensor) -> Guess:
        """See `Approximation.__call__`."""
        split, count = self._split, self._split.count
        head = split.head(x, k)
        self._ages = [age + 1 for age in self._ages]
        call, self._calls = self._calls, self._calls + 1
        if call == 0 or (call - 1) % REFRESH == 0:
            deep = split.deep(head, k)
            outputs = split.tail(head, deep, k)
            if self._kept:
                stale = split.tail(head, torch.cat(self._kept), k)
                self._rate = self._per_age(outputs.to(x) - stale.to(x))
            self._kept = list(deep.chunk(count))
            self._ages = [0] * count
            return Guess(outputs, torch.zeros_like(outputs, dtype=x.dtype))
        m = call % count
        self._kept[m] = split.deep(head, k, m)
        self._ages[m] = 0
        outputs = split.tail(head, torch.cat(self._kept), k)
        assert self._rate is not None  # measured by the second call
        grown = [rate * age for rate, age in zip(self._rate, self._ages, strict=True)]
        return Guess(outputs, torch.stack(grown))

    def _per_age(self, errors: Tensor) -> Tensor:
        return torch.stack([e / age for e, age in zip(errors, self._ages, strict=True)])


class Merged:
    """One forward of the merged network stands for all objectives; see `merged_unet`.

    Embeddings that differ between objectives are averaged with the same shares.

    Args:
        network: Of M objectives, for the exact refresh.
        merged: Of the same.
    """

    def __init__(self, network: BatchedUNet, merged: MergedUNet) -> None:
        self._network, self._merged = network, merged
        self._calls = 0
        self._errors: Tensor | None = None

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor, shares: Tensor) -> None:
        """See `Approximation.begin`."""
        self._network.begin(prompt_embeds, timesteps)
        every = shares.new_zeros(len(shares), len(self._merged.adapters.variants))
        every[:, list(self._network.objectives)] = shares
        self._merged.mix(every)
        if len(prompt_embeds) > 1:
            weight = shares.to(prompt_embeds).T[:, None, :, None, None]  # (M, 1, B, 1, 1)
            prompt_embeds = (weight * prompt_embeds).sum(0, keepdim=True)
        self._merged.begin(prompt_embeds, timesteps)

    def __call__(self, x: Tensor, k: Tensor) -> Guess:
        """See `Approximation.__call__`."""
        merged = self._merged(x, k).expand(len(self._network.objectives), -1, -1, -1, -1, -1)
        call, self._calls = self._calls, self._calls + 1
        if call % REFRESH == 0:
            outputs = self._network(x, k)
            self._errors = outputs.to(x) - merged.to(x)
            return Guess(outputs, torch.zeros_like(self._errors))
        assert self._errors is not None  # measured by the first call
        return Guess(merged, self._errors)

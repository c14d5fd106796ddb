# SPDX-License-Identifier: Apache-2.0
"""Outputs of all objectives for less than one forward of each, and how wrong they may be.

Both ways are exact at a refresh, and compare there what they would have said with what is right.
That difference, kept, is the estimated error of the steps until the next. All that one step leaves
to another lies in storage that is written in place, so that each kind of step can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey
from msdda_fast.pipelines.stable_diffusion.active_objectives import storages
from msdda_fast.pipelines.stable_diffusion.merged import MergedUNet
from msdda_fast.pipelines.stable_diffusion.split_unet import SplitUNet

__all__ = ["Approximation", "Guess", "Merged", "Staggered"]


class Guess(NamedTuple):
    """Raw outputs, and an estimate of what is missing to the exact ones; (M, K, B, C, h, w).

    Without errors the outputs are exact.
    """

    outputs: Tensor
    errors: Tensor | None


class Approximation(Protocol):
    """Stands in for the batched network of M objectives.

    Attributes:
        kinds: By kind of step, what gives its `Guess` for latents (B, C, h, w) at step k, 0-d
            int64; a generation begins with a "refresh".
    """

    kinds: Mapping[str, Callable[[Tensor, Tensor], Guess]]

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor, k: int) -> None:
        """Take the prompts (M or 1, K, B, L, D) of step k and later ones."""

    def mix(self, k: int) -> None:
        """Take the shares of step k."""

    def storages(self) -> Mapping[str, Tensor]:
        """See `engine.step.Network.storages`."""


class Staggered:
    """Deep features are kept, and those of one objective are renewed per step, in turn.

    "renew m" runs the shallow layers of all objectives and the deep layers of objective m;
    "refresh" renews all. The error of stale features is taken to grow in proportion to their age.

    Args:
        network: Of M objectives.
        key: Shapes: B, K, memory format.
        x: The state (B, C, h, w); errors are of its dtype.

    Raises:
        UnsupportedNetwork: See `SplitUNet`.
    """

    kinds: Mapping[str, Callable[[Tensor, Tensor], Guess]]

    def __init__(self, network: BatchedUNet, key: ShapeKey, x: Tensor) -> None:
        self._split = split = SplitUNet(network)
        self._kept = split.features(x, key.branches, channels_last=key.channels_last)
        self._ages = x.new_zeros(split.count, 1, 1, 1, 1, 1)  # in steps
        self._rate = x.new_zeros(split.count, key.branches, *x.shape)  # error per step of age
        self.kinds = {"refresh": self._refresh}
        self.kinds |= {f"renew {m}": partial(self._renew, m) for m in range(split.count)}

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor, k: int) -> None:
        """See `Approximation.begin`."""
        self._split.begin(prompt_embeds, timesteps)

    def mix(self, k: int) -> None:
        """Shares play no part."""

    def storages(self) -> Mapping[str, Tensor]:
        """See `Approximation.storages`."""
        named = {"kept": self._kept, "ages": self._ages, "rate": self._rate}
        for m, network in enumerate([self._split.network, *self._split.alone]):
            named |= {f"{m}.{name}": tensor for name, tensor in storages(network).items()}
        return named

    def _refresh(self, x: Tensor, k: Tensor) -> Guess:
        split = self._split
        head = split.head(x, k)
        deep = split.deep(head, k)
        outputs = split.tail(head, deep, k)
        # the first refresh compares with another generation; no step reads that, see `plan`
        stale = split.tail(head, self._kept, k)
        self._ages.add_(1)
        self._rate.copy_((outputs.to(self._rate) - stale.to(self._rate)) / self._ages)
        self._ages.zero_()
        self._kept.copy_(deep)
        return Guess(outputs, None)

    def _renew(self, m: int, x: Tensor, k: Tensor) -> Guess:
        split = self._split
        head = split.head(x, k)
        self._kept.chunk(split.count)[m].copy_(split.deep(head, k, m))
        self._ages.add_(1)
        self._ages[m].zero_()
        return Guess(split.tail(head, self._kept, k), self._rate * self._ages)


class Merged:
    """One forward of the merged network stands for all objectives; see `merged_unet`.

    Embeddings that differ between objectives are averaged with the same shares.

    Args:
        network: Of the M objectives that run, for the exact refresh.
        merged: Of all N.
        key: Shapes: B, K.
        x: The state (B, C, h, w); errors are of its dtype.
        shares: Of each step (T, B, N), on the device; read by `begin` and `mix`.
    """

    kinds: Mapping[str, Callable[[Tensor, Tensor], Guess]]

    def __init__(
        self, network: BatchedUNet, merged: MergedUNet, key: ShapeKey, x: Tensor, shares: Tensor
    ) -> None:
        self._network, self._merged, self._shares = network, merged, shares
        self._errors = x.new_zeros(len(network.objectives), key.branches, *x.shape)
        self.kinds = {"refresh": self._refresh, "merged": self._guess}

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor, k: int) -> None:
        """See `Approximation.begin`."""
        self._network.begin(prompt_embeds, timesteps)
        self._begun = prompt_embeds, timesteps
        self.mix(k)

    def mix(self, k: int) -> None:
        """See `Approximation.mix`; in place, without a sync."""
        embeds, timesteps = self._begun
        shares = self._shares[k]
        self._merged.mix(shares)
        if len(embeds) > 1:
            own = torch.stack([shares[:, m] for m in self._network.objectives])
            embeds = (own.to(embeds)[:, None, :, None, None] * embeds).sum(0, keepdim=True)
        self._merged.begin(embeds, timesteps)

    def storages(self) -> Mapping[str, Tensor]:
        """See `Approximation.storages`."""
        merged = {f"merged.{name}": tensor for name, tensor in storages(self._merged).items()}
        return storages(self._network) | merged | {"errors": self._errors}

    def _refresh(self, x: Tensor, k: Tensor) -> Guess:
        outputs = self._network(x, k)
        self._errors.copy_(outputs.to(self._errors) - self._merged(x, k).to(self._errors))
        return Guess(outputs, None)

    def _guess(self, x: Tensor, k: Tensor) -> Guess:
        outputs = self._merged(x, k).expand(len(self._network.objectives), -1, -1, -1, -1, -1)
        return Guess(outputs, self._errors)

# SPDX-License-Identifier: Apache-2.0
r"""One forward per step with the objectives' adapters merged by the shares of each sample.

Sample b runs as the network W + sum_m share_{b,m} s_m B_m A_m. All A_m are stacked by rows and all
B_m by columns; the sample's shares scale the ranks in between. No weight is copied or
rounded, so samples with different preferences share the forward.

This is not the product of experts: it averages networks, not predictions. The two agree to first
order in the adapters (the limit of Rewarded Soups).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from msdda_fast.adapters.loaded import LoadedAdapters
from msdda_fast.batched.rows import Layer
from msdda_fast.batched.sites import SiteBuilder
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import InvalidShape
from msdda_fast.lora.stack import StackedFactors
from msdda_fast.torch_private import conv_forward

__all__ = ["MergedUNet"]


class MergedSite(nn.Module):
    """A layer with M adapters, mixed separately for each sample.

    Args:
        base: Linear layer or convolution; shared, not copied.
        stacked: Its factors, down (M, R, C, *k) and up (M, N, R, *1).
    """

    base: nn.Linear | nn.Conv2d
    down: Tensor  # (M R, C, *k)
    up: Tensor  # (N, M R, *1)
    scales: Tensor  # (B, M R)

    def __init__(self, base: nn.Linear | nn.Conv2d, stacked: StackedFactors) -> None:
        super().__init__()
        self.base = base
        self.rank = stacked.down.shape[1]
        weight = base.weight
        down = stacked.down.flatten(0, 1).to(weight)
        up = stacked.up.movedim(0, 1).flatten(1, 2).to(weight)
        self.register_buffer("down", down.contiguous(), persistent=False)
        self.register_buffer("up", up.contiguous(), persistent=False)
        self.register_buffer("scales", down.new_zeros(0, len(down)), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base.weight

    def mix(self, shares: Tensor) -> None:
        """Set the shares (B, M) of all samples, in place if B is the same as before."""
        scales = shares.repeat_interleave(self.rank, 1).to(self.scales)
        if scales.shape == self.scales.shape:
            self.scales.copy_(scales)
        else:
            self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        """y[i] = x[i] W^T + b + sum_m share_{i mod B, m} (x[i] A_m^T) B_m^T.

        Args:
            x: (rows, ..., C), or (rows, C, h, w) before a convolution, with samples
                innermost in the rows. A single row applies to all samples (time embedding).

        Returns:
            The same shape with N channels and at least B rows.
        """
        conv = self.base if isinstance(self.base, nn.Conv2d) else None
        # the base's stride, padding and dilation
        hidden = conv_forward(conv, x, self.down) if conv else functional.linear(x, self.down)
        samples, rank = self.scales.shape
        tail = (rank, 1, 1) if conv else (*(1,) * (x.ndim - 2), rank)
        rows = hidden.view(-1, samples if len(x) > 1 else 1, *hidden.shape[1:])
        hidden = (rows * self.scales.view(samples, *tail)).flatten(0, 1)
        change = functional.conv2d(hidden, self.up) if conv else functional.linear(hidden, self.up)
        y: Tensor = self.base(x)
        return y + change


class MergedBuilder(SiteBuilder):
    """Builds a `MergedSite` for every layer that some objective adapts."""

    def _stacked(self, path: str) -> StackedFactors | None:
        return self._adapters.stacks.get(path)

    def _place(
        self,
        base: nn.Linear | nn.Conv2d,
        stacked: StackedFactors,
        paths: tuple[str, ...],
        *,
        once: bool = False,
    ) -> Layer:
        # to the blocks it is a layer without groups: all rows run through it together
        return cast(Layer, MergedSite(base, stacked))


class MergedUNet(BatchedUNet):
    """The merged network: a `BatchedUNet` with one objective, the mixture of all.

    Args:
        adapters: Adapters of M objectives of one network.

    Raises:
        AdapterMismatch, UnsupportedNetwork: See `BatchedUNet`.
    """

    builder = MergedBuilder

    def __init__(self, adapters: LoadedAdapters) -> None:
        super().__init__(adapters, objectives=(0,))
        self._sites = [module for module in self.modules() if isinstance(module, MergedSite)]

    @torch.no_grad()
    def mix(self, shares: Tensor) -> None:
        """Set the shares (B, M) of the objectives in each sample; call `begin` afterwards.

        Raises:
            InvalidShape: There are not M shares per sample.
        """
        count = len(self.adapters.variants)
        if shares.ndim != 2 or shares.shape[1] != count:
            raise InvalidShape(f"shares has shape {tuple(shares.shape)}, expected (B, {count})")
        for site in self._sites:
            site.mix(shares.to(site.down.device))
        self._begun = False

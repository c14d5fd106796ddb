# SPDX-License-Identifier: Apache-2.0
"""The layers of the batched forward: the stock network's own, or a grouped site in their place.

A layer that no adapter touches is the stock layer. Where all objectives have the same factors, the
site has one group, which keeps their rows together; elsewhere it has one group per objective.
Forwards of the same adapters share their sites, so that each shape of request costs no more memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msdda_fast.adapters.loaded import LoadedAdapters, bare
from msdda_fast.batched.ops import PlainOps
from msdda_fast.batched.rows import Layer
from msdda_fast.errors import AdapterMismatch, UnfaithfulMerge
from msdda_fast.kernels.grouped_lora import Design, Site, grouped_site
from msdda_fast.lora.stack import StackedFactors
from msdda_fast.torch_private import replace_parameters

__all__ = ["SiteBuilder"]


class SiteBuilder:
    """Returns the layers of one batched forward by path, in the order in which they run.

    Args:
        adapters: Adapters of all objectives of the network.
        objectives: Indices of the objectives that run.
        design: Design of the linear sites; convolutions with a kernel above 1x1 are folded. None:
            "merged", or "separate" where merging would lose too much of an adapter.
        channels_last: Give convolutions channels_last weights, copied where the layout differs.
        ops: What runs between the layers.
        times_attention: Whether attention runs on the backend that was the fastest for its shape.

    Attributes:
        ops, times_attention: As given.
        frontier: Path of the first module that treats objectives differently, or None so far.
        diverged: Whether the rows of the objectives differ after the layers placed so far.
    """

    def __init__(
        self,
        adapters: LoadedAdapters,
        objectives: Sequence[int],
        *,
        design: Design | None,
        channels_last: bool,
        ops: PlainOps,
        times_attention: bool,
    ) -> None:
        self.ops, self.times_attention = ops, times_attention
        self._adapters = adapters
        self._index = torch.tensor(objectives)
        self._design = design
        self.channels_last = channels_last
        self._placed: set[str] = set()
        self.frontier: str | None = None
        # the time embedding runs first, but is met last in the tree
        self.diverged = len(objectives) > 1 and any(
            "time_emb" in path or path.startswith("add_embedding") for path in adapters.divergent
        )

    def linear(self, path: str, *, once: bool = False) -> Layer:
        """Return the linear layer (or 1x1 convolution) at `path`; its weight is not copied.

        A layer that runs `once` per generation is "separate", the design with the least memory.
        """
        base, stacked = self._base(path), self._stacked(path)
        if isinstance(base, nn.Conv2d):
            base = _linear(base.weight.detach().flatten(1), base.bias)
            stacked = stacked and _flatten(stacked)
        return base if stacked is None else self._place(base, stacked, (path,), once=once)

    def fused(self, paths: Sequence[str]) -> Layer:
        """Fuse linear layers with the same input; their weights are copied into one."""
        bases = [self._base(path) for path in paths]
        biases = [base.bias for base in bases]
        weight = torch.cat([base.weight.detach() for base in bases])
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        base = _linear(weight, bias)
        found = [self._stacked(path) for path in paths]
        like = next((stacked for stacked in found if stacked is not None), None)
        if like is None:
            return base
        count = max(len(stacked.down) for stacked in found if stacked is not None)
        parts = []
        for layer, stacked in zip(bases, found, strict=True):
            if stacked is None:
                down = like.down.new_zeros(count, 0, layer.in_features)
                stacked = StackedFactors(down, like.up.new_zeros(count, layer.out_features, 0))
            elif len(stacked.down) < count:  # common to all objectives, beside others that are not
                stacked = StackedFactors(
                    stacked.down.expand(count, -1, -1), stacked.up.expand(count, -1, -1)
                )
            parts.append(stacked)
        return self._place(base, _join(parts), tuple(paths))

    def conv(self, path: str) -> Layer:
        """Return the convolution at `path`."""
        base, stacked = self._base(path), self._stacked(path)
        if self.channels_last:
            base = _channels_last(base)
        return base if stacked is None else self._place(base, stacked, (path,))

    def conv_and_bias(self, path: str) -> tuple[Layer, Tensor | None]:
        """Return the convolution at `path`, and its bias if another operator is to add it."""
        layer = self.conv(path)
        if not self.ops.takes_biases or not isinstance(layer, nn.Conv2d) or layer.bias is None:
            return layer, None
        clone = copy.copy(layer)
        replace_parameters(clone, bias=None)
        return clone, layer.bias.detach()

    def linear_and_bias(self, path: str) -> tuple[Layer, Tensor | None]:
        """Return the linear layer at `path`, and its bias if another operator is to add it."""
        base = self._base(path)
        if not self.ops.takes_biases or base.bias is None:
            return self.linear(path), None
        bare_base, stacked = _linear(base.weight.detach(), None), self._stacked(path)
        layer = bare_base if stacked is None else self._place(bare_base, stacked, (path,))
        return layer, base.bias.detach()

    def norm(self, path: str) -> Any:  # noqa: ANN401 - a group or layer norm
        """Return the layer at `path`, of a kind that no adapter can change."""
        return bare(self._adapters.unet.get_submodule(path))

    def check_complete(self) -> None:
        """Raise `AdapterMismatch` if an adapter changes a layer that was not requested."""
        for path in self._adapters.stacks:
            if path not in self._placed:
                raise AdapterMismatch(
                    f"an adapter changes {path!r}, which is not part of the batched forward"
                )

    def _base(self, path: str) -> Any:  # noqa: ANN401 - linear layer or convolution
        self._placed.add(path)
        return bare(self._adapters.unet.get_submodule(path))

    def _stacked(self, path: str) -> StackedFactors | None:
        stacked = self._adapters.stacks.get(path)
        if stacked is None:
            return None
        index = self._index if path in self._adapters.divergent else self._index[:1]
        index = index.to(stacked.down.device)
        return StackedFactors(stacked.down[index], stacked.up[index])

    def _place(
        self,
        base: nn.Linear | nn.Conv2d,
        stacked: StackedFactors,
        paths: tuple[str, ...],
        *,
        once: bool = False,
    ) -> Layer:
        design = "separate" if once else self._design
        key = paths, tuple(self._index.tolist()), design, base.bias is None, self.channels_last
        site = self._adapters.sites.get(key)
        if site is None:
            site = self._adapters.sites[key] = _site(base, stacked, design, ", ".join(paths))
        assert isinstance(site, Site)  # there are factors, so it is not the base
        if site.num_objectives > 1:
            self.frontier = self.frontier or paths[0]
            self.diverged = True
        return site


def _site(
    base: nn.Linear | nn.Conv2d, stacked: StackedFactors, design: Design | None, name: str
) -> nn.Module:
    factors = stacked.down, stacked.up
    if design is not None:
        return grouped_site(base, *factors, design=design, name=name)
    try:
        return grouped_site(base, *factors, design="merged", name=name)
    except UnfaithfulMerge:
        return grouped_site(base, *factors, design="separate", name=name)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds these tensors, not copies."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    clone = copy.copy(conv)
    replace_parameters(clone, weight=nn.Parameter(weight, requires_grad=False))
    return clone


def _flatten(stacked: StackedFactors) -> StackedFactors:
    return StackedFactors(stacked.down.flatten(2), stacked.up.flatten(2))


def _join(parts: Sequence[StackedFactors]) -> StackedFactors:
    """Return factors of concatenated layers: `down` stacked, `up` block-diagonal."""
    if len(parts) == 1:
        return parts[0]
    down = torch.cat([part.down for part in parts], dim=1)
    blocks = zip(*(part.up for part in parts), strict=True)
    up = [torch.block_diag(*block) for block in blocks]  # type: ignore[no-untyped-call]
    return StackedFactors(down, torch.stack(up))

# SPDX-License-Identifier: Apache-2.0
"""The batched forward in three parts: shallow way down, deep layers, shallow way up.

The deep layers run at low resolution on what changes little between steps. Their output can be kept
and used again, as in DeepCache, with one network per objective to renew one objective's alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from msdda_fast.batched.attention import ATTENTION_BACKENDS
from msdda_fast.batched.blocks import Body, DownBlock, Step, UpBlock, norm_silu
from msdda_fast.batched.rows import Rows, apply
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import UnsupportedNetwork

__all__ = ["Head", "SplitUNet"]

#: Layers at the end of the way up that run in every step. They take the two outputs of the head.
SHALLOW_PAIRS = 2


class Head(NamedTuple):
    """The outputs of the first convolution and of the first layer, (rows, C, h, w)."""

    first: Rows
    second: Rows

    def of(self, m: int) -> Head:
        """Those of one objective, a view."""
        return Head(*(_of(rows, m) for rows in self))


def _of(rows: Rows, m: int) -> Rows:
    if rows.objectives == 1:
        return rows
    return Rows(rows.x.chunk(rows.objectives)[m], 1, rows.branches)


def _first(body: Body) -> DownBlock:
    block = body.down_blocks[0]
    assert isinstance(block, DownBlock)
    return block


def _last(body: Body) -> UpBlock:
    block = body.up_blocks[-1]
    assert isinstance(block, UpBlock)
    return block


def _width(norm: object) -> int:
    assert isinstance(norm, nn.GroupNorm)
    return norm.num_channels


class SplitUNet:
    """A batched network and, per objective, one that runs it alone; all share the weights.

    `tail(head, deep(head, k), k)` is the network's own forward, operator by operator.

    Args:
        network: Of M objectives.

    Raises:
        UnsupportedNetwork: The last block up has fewer than two layers.
    """

    network: BatchedUNet
    count: int
    alone: list[BatchedUNet]

    def __init__(self, network: BatchedUNet) -> None:
        count = len(network.objectives)
        last = _last(network.body)
        if len(last.resnets) < SHALLOW_PAIRS or last.upsample is not None:
            raise UnsupportedNetwork(
                f"the last block up has {len(last.resnets)} layers and it is expected to have "
                f"{SHALLOW_PAIRS} or more, and no upsampling after them"
            )
        self.network = network
        self.count = count
        self.alone = [network.subset([m == n for n in range(count)]) for m in range(count)]

    def begin(self, prompt_embeds: Tensor, timesteps: Tensor) -> None:
        """See `BatchedUNet.begin`; embeddings (M or 1, K, B, L, D)."""
        self.network.begin(prompt_embeds, timesteps)
        if self.count > 1:
            for m, network in enumerate(self.alone):
                own = prompt_embeds[m : m + 1] if len(prompt_embeds) > 1 else prompt_embeds
                network.begin(own, timesteps)

    def features(self, x: Tensor, branches: int, *, channels_last: bool) -> Tensor:
        """Storage for the deep features of all objectives: zeros (M K B, C, h, w).

        Args:
            x: Latents (B, C', h, w).
            branches: K.
            channels_last: Its memory format.
        """
        body = self.network.body
        # what the first shallow layer up takes, less what the head gives it
        taken = _width(_last(body).resnets[-SHALLOW_PAIRS].norm1)
        channels = taken - _width(_first(body).resnets[0].norm2)
        shape = (self.count * branches * len(x), channels, *x.shape[2:])
        layout = torch.channels_last if channels_last else torch.contiguous_format
        kept = torch.zeros(shape, dtype=self.network.dtype, device=x.device)
        return kept.to(memory_format=layout)

    @torch.no_grad()
    def head(self, x: Tensor, k: Tensor) -> Head:
        """The way down as far as the first layer, of latents (B, C, h, w), for all objectives."""
        network = self.network
        with sdpa_kernel(ATTENTION_BACKENDS[network.attention_backend]):
            rows, step = network.enter(x, k)
            first = apply(network.body.conv_in, rows)
            return Head(first, _first(network.body).pair(0, first, step))

    @torch.no_grad()
    def deep(self, head: Head, k: Tensor, m: int | None = None) -> Tensor:
        """What the last layers of the way up take, for objective m or for all (None).

        Returns: (K B, C, h, w), or (M K B, C, h, w), new.
        """
        network, count = (self.network, self.count) if m is None else (self.alone[m], 1)
        head = head if m is None else head.of(m)
        body = network.body
        with sdpa_kernel(ATTENTION_BACKENDS[network.attention_backend]):
            step = network.step(k)
            rows, skips = head.second, list(head)
            start = _first(body)
            for i in range(1, len(start.resnets)):
                rows = start.pair(i, rows, step)
                skips.append(rows)
            if start.downsample is not None:
                rows = apply(start.downsample, rows)
                skips.append(rows)
            for block in body.down_blocks[1:]:
                skips += block(rows, step)
                rows = skips[-1]
            if body.mid_block is not None:
                rows = body.mid_block(rows, step)
            for block in body.up_blocks[:-1]:
                rows = block(rows, skips, step)
            last = _last(body)
            for i in range(len(last.resnets) - SHALLOW_PAIRS):
                rows = last.join(i, rows, skips, step)
            return rows.expand(count, step.prompts.branches).x

    @torch.no_grad()
    def tail(self, head: Head, deep: Tensor, k: Tensor) -> Tensor:
        """The last layers of all objectives, on deep features (M K B, C, h, w).

        Returns: (M, K, B, C, h, w) in the dtype of the network, new.
        """
        network, body = self.network, self.network.body
        with sdpa_kernel(ATTENTION_BACKENDS[network.attention_backend]):
            step: Step = network.step(k)
            rows = Rows(deep, self.count, step.prompts.branches)
            skips, last = list(head), _last(body)
            for i in range(len(last.resnets) - SHALLOW_PAIRS, len(last.resnets)):
                rows = last.join(i, rows, skips, step)
            out = apply(body.conv_out, norm_silu(body.conv_norm_out, rows))
            return network.leave(out)

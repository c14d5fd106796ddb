# SPDX-License-Identifier: Apache-2.0
"""Resnets and blocks of the batched forward, built from diffusers' blocks on their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    UNetMidBlock2DCrossAttn,
)
from torch import Tensor, nn
from torch.nn import functional

from msdda_fast.batched.attention import Transformer
from msdda_fast.batched.rows import Rows, apply, concatenate
from msdda_fast.batched.sites import SiteBuilder

__all__ = ["Body", "DownBlock", "Step", "UpBlock"]


class Step(NamedTuple):
    """The inputs that all layers of one forward share.

    `times` holds what each resnet adds to its channels, (rows, C, 1, 1), in order; `prompts` holds
    the text embeddings (rows, L, D).
    """

    times: list[Rows]
    prompts: Rows


class Resnet(nn.Module):
    """norm, SiLU, convolution, + time, norm, SiLU, convolution, + input."""

    bias: Tensor | None  # (N,), of `conv2` and `shortcut`, if they leave theirs to the sum

    def __init__(self, build: SiteBuilder, path: str, stock: ResnetBlock2D, index: int) -> None:
        super().__init__()
        self.index = index  # among all resnets of the network
        self.ops = build.ops
        self.time_emb_proj = build.linear(f"{path}.time_emb_proj")
        self.norm1 = build.norm(f"{path}.norm1")
        #: The bias of `conv1`, if it is among what the times add to its channels.
        self.conv1, self.shift = build.conv_and_bias(f"{path}.conv1")
        self.norm2 = build.norm(f"{path}.norm2")
        self.conv2, bias = build.conv_and_bias(f"{path}.conv2")
        self.shortcut = None
        if stock.conv_shortcut is not None:
            self.shortcut, other = build.conv_and_bias(f"{path}.conv_shortcut")
            bias = other if bias is None else bias if other is None else bias + other
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Rows, step: Step) -> Rows:
        """(rows, C, h, w) -> (rows, C', h, w)."""
        norm, times = self.ops.group_norm, step.times[self.index]
        hidden = apply(self.conv1, norm(self.norm1, rows, silu=True))
        hidden = apply(self.conv2, norm(self.norm2, hidden, silu=True, shift=times))
        start = rows if self.shortcut is None else apply(self.shortcut, rows)
        return self.ops.add(start, hidden, self.bias)


class _Block(nn.Module):
    """Resnets, each followed by a transformer where the stock block has one."""

    def __init__(
        self,
        build: SiteBuilder,
        path: str,
        stock: UNetMidBlock2DCrossAttn,
        first: int,
        *,
        fuse: bool,
    ) -> None:
        super().__init__()
        attentions = list(getattr(stock, "attentions", ()))
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for i, resnet in enumerate(stock.resnets):
            self.resnets.append(Resnet(build, f"{path}.resnets.{i}", resnet, first + i))
            if i < len(attentions):
                name = f"{path}.attentions.{i}"
                self.attentions.append(Transformer(build, name, attentions[i], fuse=fuse))

    def pair(self, i: int, rows: Rows, step: Step) -> Rows:
        """Run resnet i and its transformer."""
        rows = self.resnets[i](rows, step)
        return self.attentions[i](rows, step.prompts) if i < len(self.attentions) else rows


class DownBlock(_Block):
    """The batched `DownBlock2D` or `CrossAttnDownBlock2D`."""

    def __init__(
        self, build: SiteBuilder, path: str, stock: CrossAttnDownBlock2D, first: int, *, fuse: bool
    ) -> None:
        super().__init__(build, path, stock, first, fuse=fuse)
        self.downsample = None
        if stock.downsamplers is not None:
            self.downsample = build.conv(f"{path}.downsamplers.0.conv")

    def forward(self, rows: Rows, step: Step) -> list[Rows]:
        """(rows, C, h, w) -> outputs of all layers, for the up blocks; the last is the block's."""
        outputs = []
        for i in range(len(self.resnets)):
            rows = self.pair(i, rows, step)
            outputs.append(rows)
        if self.downsample is not None:
            outputs.append(apply(self.downsample, rows))
        return outputs


class MidBlock(_Block):
    """The batched `UNetMidBlock2DCrossAttn`."""

    def forward(self, rows: Rows, step: Step) -> Rows:
        """(rows, C, h, w) -> the same shape."""
        for i in range(len(self.resnets)):
            rows = self.pair(i, rows, step)
        return rows


class UpBlock(_Block):
    """The batched `UpBlock2D` or `CrossAttnUpBlock2D`."""

    def __init__(
        self, build: SiteBuilder, path: str, stock: CrossAttnUpBlock2D, first: int, *, fuse: bool
    ) -> None:
        super().__init__(build, path, stock, first, fuse=fuse)
        self.upsample = None
        if stock.upsamplers is not None:
            self.upsample = build.conv(f"{path}.upsamplers.0.conv")

    def forward(self, rows: Rows, skips: list[Rows], step: Step) -> Rows:
        """(rows, C, h, w) -> (rows, C', h', w'), popping its inputs off the end of `skips`."""
        for i in range(len(self.resnets)):
            rows = self.join(i, rows, skips, step)
        if self.upsample is None:
            return rows
        # the size of what it meets next, which need not be twice its own
        size = skips[-1].x.shape[2:]
        larger = functional.interpolate(rows.x, size=size, mode="nearest")
        return apply(self.upsample, rows.holding(larger))

    def join(self, i: int, rows: Rows, skips: list[Rows], step: Step) -> Rows:
        """Run resnet i and its transformer on `rows` and the end of `skips`."""
        return self.pair(i, concatenate(rows, skips.pop()), step)


_B = TypeVar("_B", DownBlock, MidBlock, UpBlock)


class Body(nn.Module):
    """From a latent to the raw output: down blocks, middle block, up blocks."""

    def __init__(self, build: SiteBuilder, unet: UNet2DConditionModel, *, fuse: bool) -> None:
        super().__init__()
        count = 0

        def block(kind: Callable[..., _B], path: str, stock: CrossAttnDownBlock2D) -> _B:
            nonlocal count
            made = kind(build, path, stock, count, fuse=fuse)
            count += len(stock.resnets)
            return made

        self.conv_in = build.conv("conv_in")
        self.down_blocks = nn.ModuleList(
            block(DownBlock, f"down_blocks.{i}", stock) for i, stock in enumerate(unet.down_blocks)
        )
        self.mid_block = None
        if unet.mid_block is not None:
            self.mid_block = block(MidBlock, "mid_block", unet.mid_block)
        self.up_blocks = nn.ModuleList(
            block(UpBlock, f"up_blocks.{i}", stock) for i, stock in enumerate(unet.up_blocks)
        )
        self.ops = build.ops
        self.conv_norm_out = build.norm("conv_norm_out")
        self.conv_out = build.conv("conv_out")

    def resnets(self) -> list[Resnet]:
        """All resnets, by index."""
        return [module for module in self.modules() if isinstance(module, Resnet)]

    def forward(self, rows: Rows, step: Step) -> Rows:
        """(rows, C, h, w) -> (rows, C', h, w)."""
        rows = apply(self.conv_in, rows)
        skips = [rows]
        for block in self.down_blocks:
            skips += block(rows, step)
            rows = skips[-1]
        if self.mid_block is not None:
            rows = self.mid_block(rows, step)
        for block in self.up_blocks:
            rows = block(rows, skips, step)
        return apply(self.conv_out, self.ops.group_norm(self.conv_norm_out, rows, silu=True))

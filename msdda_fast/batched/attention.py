# SPDX-License-Identifier: Apache-2.0
"""Transformers of the batched forward: attention on grouped sites, cached prompt keys/values."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from msdda_fast.batched.attention_choice import attention
from msdda_fast.batched.rows import Rows, add, apply, apply_all, hold_all, objectives_of
from msdda_fast.batched.sites import SiteBuilder
from msdda_fast.errors import BackendUnavailable

__all__ = ["ATTENTION_BACKENDS", "CrossAttention", "Transformer", "choose_backend"]

ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def choose_backend(name: str, head_dims: set[int], dtype: torch.dtype, device: torch.device) -> str:
    """Return the backend called `name`, or for "auto" the first of flash, efficient and math.

    Raises:
        BackendUnavailable: It cannot run with these head sizes, this dtype or this device.
        ValueError: The name is unknown.
    """
    if name not in (*ATTENTION_BACKENDS, "auto"):
        known = ", ".join(ATTENTION_BACKENDS)
        raise ValueError(f'attention must be "auto" or one of {known}, got {name!r}')
    for candidate in ("flash", "efficient", "math") if name == "auto" else (name,):
        if all(_runs(candidate, head_dim, dtype, device) for head_dim in head_dims):
            return candidate
    raise BackendUnavailable(
        f"attention backend {name!r} cannot run here with head sizes {sorted(head_dims)}, {dtype} "
        f"on {device.type}"
    )


def _runs(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    probe = torch.zeros(1, 1, 8, head_dim, dtype=dtype, device=device)
    try:
        with warnings.catch_warnings(), sdpa_kernel(ATTENTION_BACKENDS[name]):
            warnings.simplefilter("ignore")  # torch warns of every reason, and then raises
            functional.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError:
        return False
    return True


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, *, timed: bool) -> Tensor:
    """Attention of (rows, L, C) and (rows, S, C) tensors in `heads` heads, see `attention`."""
    query, key, value = (
        tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2) for tokens in (query, key, value)
    )
    attend = attention if timed else functional.scaled_dot_product_attention
    out = attend(query, key, value)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention: q, k and v of the same tokens, in three launches or, with `fuse`, one."""

    bias: Tensor | None  # (C,), of `to_out`, if it is not in its result

    def __init__(self, build: SiteBuilder, path: str, stock: Attention, *, fuse: bool) -> None:
        super().__init__()
        self.heads, self.timed = stock.heads, build.times_attention
        paths = [f"{path}.to_{name}" for name in "qkv"]
        layers = [build.fused(paths)] if fuse else [build.linear(path) for path in paths]
        self.to_qkv = nn.ModuleList(layers)
        self.to_out, bias = build.linear_and_bias(f"{path}.to_out.0")
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Rows) -> Rows:
        """(rows, L, C) -> (rows, L, C)."""
        rows = rows.expand(objectives_of(*self.to_qkv))
        tokens = [layer(rows.x) for layer in self.to_qkv]
        query, key, value = tokens if len(tokens) == 3 else tokens[0].chunk(3, dim=-1)
        out = _attend(query, key, value, self.heads, timed=self.timed)
        return apply(self.to_out, rows.holding(out))


class CrossAttention(nn.Module):
    """Attention to the prompt, whose keys and values come from `keep` or from each call."""

    bias: Tensor | None  # (C,), of `to_out`, if it is not in its result

    def __init__(self, build: SiteBuilder, path: str, stock: Attention) -> None:
        super().__init__()
        self.heads, self.timed = stock.heads, build.times_attention
        self.to_q = build.linear(f"{path}.to_q")
        self.to_k = build.linear(f"{path}.to_k", once=True)
        self.to_v = build.linear(f"{path}.to_v", once=True)
        #: Whether the rows that come here differ between objectives.
        self.diverged = build.diverged
        self.to_out, bias = build.linear_and_bias(f"{path}.to_out.0")
        self.register_buffer("bias", bias, persistent=False)
        self._kept: Sequence[Rows] | None = None

    def keep(self, prompts: Rows, objectives: int) -> None:
        """Store the keys and values of prompts (m K B, L, D), in place if the shapes are the same.

        They get `objectives` rows per image if the queries will have as many.
        """
        count = objectives if self.diverged else 1
        self._kept = hold_all(self._kept, self._project(prompts, count))

    def forward(self, rows: Rows, prompts: Rows) -> Rows:
        """(rows, L, C) -> (rows, L, C), with a branch axis."""
        query = apply(self.to_q, rows)
        key, value = self._kept or self._project(prompts, query.objectives)
        query = query.expand(*key[1:])
        key, value = (tokens.expand(*query[1:]) for tokens in (key, value))
        out = _attend(query.x, key.x, value.x, self.heads, timed=self.timed)
        return apply(self.to_out, query.holding(out))

    def _project(self, prompts: Rows, objectives: int) -> list[Rows]:
        layers = self.to_k, self.to_v
        return apply_all(layers, prompts, together=True, objectives=objectives)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, gated feed-forward, each after a norm and residual."""

    def __init__(
        self, build: SiteBuilder, path: str, stock: BasicTransformerBlock, *, fuse: bool
    ) -> None:
        super().__init__()
        self.ops = build.ops
        self.norm1 = build.norm(f"{path}.norm1")
        self.attn1 = SelfAttention(build, f"{path}.attn1", stock.attn1, fuse=fuse)
        self.norm2 = build.norm(f"{path}.norm2")
        self.attn2 = CrossAttention(build, f"{path}.attn2", stock.attn2)
        self.norm3 = build.norm(f"{path}.norm3")
        self.ff_in = build.linear(f"{path}.ff.net.0.proj")
        self.ff_out = build.linear(f"{path}.ff.net.2")

    def forward(self, rows: Rows, prompts: Rows) -> Rows:
        """(rows, L, C) -> (rows, L, C)."""
        add_and_norm = self.ops.add_and_norm
        found = self.attn1(apply(self.norm1, rows))
        rows, normed = add_and_norm(rows, found, self.norm2, self.attn1.bias)
        found = self.attn2(normed, prompts)
        rows, normed = add_and_norm(rows, found, self.norm3, self.attn2.bias)
        gated = self.ops.geglu(apply(self.ff_in, normed))
        return add(rows, apply(self.ff_out, gated))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a picture.

    Projections that are 1x1 convolutions in the stock network run as linear layers on the tokens:
    in channels_last these are the same memory.
    """

    def __init__(
        self, build: SiteBuilder, path: str, stock: Transformer2DModel, *, fuse: bool
    ) -> None:
        super().__init__()
        self.ops = build.ops
        self.norm = build.norm(f"{path}.norm")
        self.proj_in = build.linear(f"{path}.proj_in")
        self.blocks = nn.ModuleList(
            TransformerBlock(build, f"{path}.transformer_blocks.{i}", block, fuse=fuse)
            for i, block in enumerate(stock.transformer_blocks)
        )
        self.proj_out = build.linear(f"{path}.proj_out")

    def forward(self, rows: Rows, prompts: Rows) -> Rows:
        """(rows, C, h, w) -> (rows, C, h, w)."""
        height, width = rows.x.shape[2:]
        normed = self.ops.group_norm(self.norm, rows, silu=False)
        tokens = rows.holding(normed.x.permute(0, 2, 3, 1).flatten(1, 2))
        tokens = apply(self.proj_in, tokens)
        for block in self.blocks:
            tokens = block(tokens, prompts)
        tokens = apply(self.proj_out, tokens)
        picture = tokens.x.view(len(tokens.x), height, width, -1).permute(0, 3, 1, 2)
        return add(rows, tokens.holding(picture))

# SPDX-License-Identifier: Apache-2.0
"""Time embeddings of the batched forward: for all steps of a schedule at once, or one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from msdda_fast.batched.rows import Layer, Rows, add, apply, apply_all
from msdda_fast.batched.sites import SiteBuilder
from msdda_fast.errors import InvalidShape

__all__ = ["AddedConditions", "TimeEmbedding"]


@dataclass(frozen=True, slots=True)
class AddedConditions:
    """Conditions that Stable Diffusion XL adds to the time embedding.

    Attributes:
        text_embeds: Pooled prompts, (M or 1, K, B, P).
        time_ids: Original size, crop and target size in pixels, (M or 1, K, B, 6).
    """

    text_embeds: Tensor
    time_ids: Tensor

    def rows(self) -> tuple[Rows, Tensor]:
        """Return `text_embeds` as rows (m K B, P), and `time_ids` as (m K B, 6)."""
        m, k = self.text_embeds.shape[:2]
        return Rows(self.text_embeds.flatten(0, 2), m, k), self.time_ids.flatten(0, 2)


class _Embedding(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, build: SiteBuilder, path: str) -> None:
        super().__init__()
        self.linear_1 = build.linear(f"{path}.linear_1")
        self.linear_2 = build.linear(f"{path}.linear_2")

    def forward(self, rows: Rows) -> Rows:
        """(rows, T, D) -> (rows, T, D')."""
        rows = apply(self.linear_1, rows)
        return apply(self.linear_2, rows.holding(functional.silu(rows.x)))


class TimeEmbedding(nn.Module):
    """Computes from timesteps and SDXL's conditions what each resnet adds to its channels."""

    def __init__(self, build: SiteBuilder, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.time_proj = unet.time_proj
        self.embedding = _Embedding(build, "time_embedding")
        self.added = None
        if unet.config.addition_embed_type == "text_time":
            self.add_time_proj = unet.add_time_proj
            self.added = _Embedding(build, "add_embedding")

    def check(self, added: AddedConditions | None, shape: Sequence[int]) -> None:
        """Check the conditions against the network and `shape`, (M, K, B).

        Raises:
            InvalidShape: They are missing, not accepted by the network, or of the wrong shape.
        """
        if (added is None) != (self.added is None):
            expected = "no added conditions" if self.added is None else "AddedConditions"
            raise InvalidShape(f"got added={added!r:.40}, but this network takes {expected}")
        if added is None:
            return
        m, k, b = shape
        text, ids = added.text_embeds.shape, added.time_ids.shape
        if text[:3] not in ((m, k, b), (1, k, b)) or ids[:3] != text[:3]:
            raise InvalidShape(
                f"text_embeds {tuple(text)} and time_ids {tuple(ids)}, expected {(m, k, b)} or "
                f"{(1, k, b)} first"
            )

    def forward(
        self, timesteps: Tensor, added: AddedConditions | None, projections: Sequence[Layer]
    ) -> Rows:
        """Return what all resnets add at the given timesteps.

        Args:
            timesteps: (T,) int64.
            added: Conditions, for a network that takes them.
            projections: The resnets' time layers, with C_i output channels.

        Returns:
            (m k b, T, sum of C_i), with the axes on which conditions or adapters depend.
        """
        dtype = self.embedding.linear_1.weight.dtype
        emb = self.embedding(Rows(self.time_proj(timesteps).to(dtype)[None]))
        if self.added is not None and added is not None:
            pooled, ids = added.rows()
            sizes = self.add_time_proj(ids.flatten()).view(len(ids), -1)
            both = torch.cat([pooled.x, sizes.to(pooled.x.device)], dim=-1).to(dtype)
            emb = add(emb, self.added(pooled.holding(both[:, None])))
        emb = emb.holding(functional.silu(emb.x))
        parts = apply_all(projections, emb)
        count = max(len(part.x) for part in parts)  # a layer may also part the samples
        wide = [part.x.expand(count, -1, -1) for part in parts]
        return parts[0].holding(torch.cat(wide, dim=-1))

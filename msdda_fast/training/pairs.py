# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: the best samples of a prompt against the worst of the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape


@dataclass(frozen=True, slots=True)
class PreferencePairs:
    """N pairs of clean latents, of which the chosen one is preferred under the same prompt."""

    chosen: Tensor  # x_0 preferred, (N, C, H, W), in latent units (scaled as the UNet sees them)
    rejected: Tensor  # x_0 not preferred, (N, C, H, W)
    prompt_index: Tensor  # (N,) int64, row of the table of prompt embeddings

    def __post_init__(self) -> None:
        shapes = tuple(self.chosen.shape), tuple(self.rejected.shape)
        if self.chosen.dim() < 2 or shapes[0] != shapes[1]:
            raise InvalidShape(f"chosen and rejected must share a shape (N, *S), got {shapes}")
        if tuple(self.prompt_index.shape) != shapes[0][:1]:
            raise InvalidShape(
                f"prompt_index must have shape {shapes[0][:1]}, "
                f"got {tuple(self.prompt_index.shape)}"
            )
        if self.prompt_index.dtype != torch.int64:
            raise ValueError(f"prompt_index must be int64, got {self.prompt_index.dtype}")
        if not len(self):
            raise ValueError("no pairs: a prompt needs two samples with different scores")
        if not (self.chosen.isfinite().all() and self.rejected.isfinite().all()):
            raise ValueError("chosen or rejected has NaN or infinite latents")

    def __len__(self) -> int:
        return self.chosen.shape[0]


def preference_pairs(
    latents: Tensor,
    scores: Tensor,
    prompt_index: Tensor,
    *,
    top_fraction: float = 1 / 3,
    generator: torch.Generator | None = None,
) -> PreferencePairs:
    """Match the top fraction of each prompt's samples with its bottom fraction, one to one.

    Samples are ranked within a prompt, never across: most of the variance of a reward lies between
    prompts, and only samples of one prompt may be compared. Of a prompt's n samples
    k = min(n // 2, max(1, floor(top_fraction n))) are chosen and k rejected, matched at random.
    Pairs of equal score express no preference and are dropped.

    Args:
        latents: Clean latents x_0, (S, C, H, W).
        scores: Reward of each, (S,), any unit; only the order matters.
        prompt_index: Prompt of each, (S,) int64, in any order.
        top_fraction: In (0, 0.5].
        generator: CPU generator for the matching; None: one with seed 0.

    Raises:
        InvalidShape: The lengths differ.
        ValueError: A score is NaN, top_fraction is out of range, or no pair is left.
    """
    count = latents.shape[0]
    if tuple(scores.shape) != (count,) or tuple(prompt_index.shape) != (count,):
        raise InvalidShape(
            f"{count} latents need scores and prompt_index of shape ({count},), "
            f"got {tuple(scores.shape)} and {tuple(prompt_index.shape)}"
        )
    if not 0.0 < top_fraction <= 0.5:
        raise ValueError(f"top_fraction must be in (0, 0.5], got {top_fraction}")
    if scores.isnan().any():
        raise ValueError(f"scores has {int(scores.isnan().sum())} NaN of {count}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    prompts, prompt, sizes = torch.unique(
        prompt_index.cpu(), return_inverse=True, return_counts=True
    )
    by_score = scores.cpu().argsort(stable=True)
    order = by_score[prompt[by_score].argsort(stable=True)]  # by prompt, then by rising score
    prompt = prompt[order]
    rank = torch.arange(count) - (sizes.cumsum(0) - sizes)[prompt]
    # .29 of 100 are 29, though their product in float64 is a rounding error short of it.
    wanted = (sizes.double() * top_fraction + 1e-9).floor().long().clamp_min(1)
    taken = torch.minimum(wanted, sizes // 2)[prompt]

    rejected = order[rank < taken]
    is_chosen = rank >= sizes[prompt] - taken
    chosen, prompt = order[is_chosen], prompt[is_chosen]
    shuffle = torch.rand(len(chosen), generator=generator).argsort()
    chosen = chosen[shuffle[prompt[shuffle].argsort(stable=True)]]  # shuffled within each prompt

    is_strict = scores.cpu()[chosen] > scores.cpu()[rejected]
    chosen, rejected, prompt = chosen[is_strict], rejected[is_strict], prompt[is_strict]
    return PreferencePairs(
        latents[chosen.to(latents.device)], latents[rejected.to(latents.device)], prompts[prompt]
    )

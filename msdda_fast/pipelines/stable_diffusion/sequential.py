# SPDX-License-Identifier: Apache-2.0
"""The objectives' networks one after another, where no batched forward can run them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.adapters.variant import Variant
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["SequentialNetwork"]


class SequentialNetwork:
    """Evaluates active objectives in turn, switching adapters in between.

    Args:
        variants: M networks, one per objective; they may be the same module.
        switch: The entered switch of the adapters of every network.
        table: Gives the active objectives and the timestep of each step.
        dtype: Dtype of the outputs.

    Attributes:
        prompt_embeds: (M, K, B, L, D), to be set before the first step; K = 2 holds (uncond, cond),
            K = 1 cond alone.
        active: [T][M], whether an objective has influence on some sample at a step.
    """

    prompt_embeds: Tensor

    def __init__(
        self,
        variants: Sequence[Variant],
        switch: AdapterSwitch,
        table: CoefficientTable,
        dtype: torch.dtype,
    ) -> None:
        self._variants, self._switch, self._dtype = variants, switch, dtype
        self._timesteps = table.timesteps
        self.active: list[list[bool]] = table.influence.tolist()

    def __call__(self, x: Tensor, k: int) -> list[Tensor | None]:
        """Return the raw outputs (K, B, C, h, w) of M objectives; None if not active at step k."""
        return self.evaluate(x, k, [m for m, runs in enumerate(self.active[k]) if runs])

    def evaluate(
        self, x: Tensor, k: int, objectives: Collection[int], branches: slice = slice(None)
    ) -> list[Tensor | None]:
        """Return outputs of some objectives and branches of guidance; None for other objectives."""
        t = self._timesteps[k]
        return [
            self._switch.predict(variant, x, t, embeds[branches]).to(self._dtype)
            if m in objectives
            else None
            for m, (variant, embeds) in enumerate(
                zip(self._variants, self.prompt_embeds, strict=True)
            )
        ]

# SPDX-License-Identifier: Apache-2.0
"""Static tensors of a captured step with weights of every pixel."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.steps.pixels import PixelTable, weights_of_step

__all__ = ["PixelBuffers"]


@dataclass(frozen=True, slots=True, eq=False)
class PixelBuffers:
    """What `PixelTable` holds, and room for the objectives' means.

    Weights are the same in all channels of a pixel. M are the objectives that have weights, the
    base not among them.

    Attributes:
        rows: (M, max_steps, B, C) float32.
        numbers: (max_steps, 3, M, B) float32.
        own: (M, B, 1, *S[1:]) float32, no unit.
        rest: (B, 1, *S[1:]) float32, no unit.
        means: (M, B, *S) float32, written and read within a step.
    """

    rows: Tensor
    numbers: Tensor
    own: Tensor
    rest: Tensor
    means: Tensor

    @classmethod
    def allocate(
        cls,
        count: int,
        shape: tuple[int, ...],
        columns: int,
        max_steps: int,
        device: torch.device | str,
    ) -> Self:
        """Make the tensors, filled with zeros, but with the weight on the first objective.

        Args:
            count: M.
            shape: (B, *S) of the latents.
            columns: C.
            max_steps: Length of the tables.
            device: Of the step.
        """
        batch, _, *pixels = shape
        made = cls(
            rows=torch.zeros(count, max_steps, batch, columns, device=device),
            numbers=torch.zeros(max_steps, 3, count, batch, device=device),
            own=torch.zeros(count, batch, 1, *pixels, device=device),
            rest=torch.ones(batch, 1, *pixels, device=device),
            means=torch.zeros(count, *shape, device=device),
        )
        made.numbers[:, 2, 0] = 1.0  # a step before the first request divides by their sum
        return made

    def nbytes(self) -> int:
        """Return how many bytes they take."""
        return sum(getattr(self, entry.name).nbytes for entry in fields(self))

    def parts(self, table: PixelTable) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, static tensor, value) of what a request overwrites.

        Raises:
            InvalidShape: The weights are not the same in all channels, or of another size.
        """
        steps = table.means.shape[1]
        try:
            own = table.own.expand(self.own.shape)
            rest = table.rest.expand(self.rest.shape)
        except RuntimeError:
            raise InvalidShape(
                f"weights of every pixel have shape {tuple(table.own.transpose(0, 1).shape)}, "
                f"expected (B, M, 1, *S) = {tuple(self.own.transpose(0, 1).shape)}, or 1 in place "
                "of axes of S"
            ) from None
        return [
            ("rows of pixels", self.rows[:, :steps], table.means),
            ("numbers of pixels", self.numbers[:steps], table.numbers),
            ("weights of pixels", self.own, own),
            ("rest of pixels", self.rest, rest),
        ]

    def at(self, counter: Tensor) -> tuple[Tensor, Tensor]:
        """Return variances (M, B) and weights (M, B, 1, *S[1:]) of the step that `counter` says."""
        variances, factor, mixed = self.numbers.index_select(0, counter.view(1))[0]
        return variances, weights_of_step(self.own, self.rest, factor, mixed)

# SPDX-License-Identifier: Apache-2.0
"""Where the outputs of one kind of step lie on every rank: static storage for an all-gather."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.engine.assignment import Work, assign
from msdda_fast.errors import InvalidShape

__all__ = ["Exchange"]


class Exchange:
    """The rows that ranks evaluate in a step, and what all of them evaluated.

    Every rank has as many slots as the busiest one has rows, so that one collective moves all.

    Args:
        active: M flags, at least one set.
        branches: K.
        shape: (B, *S) of the latents.
        rank, size: This rank, and W.
        split_guidance: See `assign`.
        dtype: Of the outputs.
        device: Of the outputs.

    Attributes:
        active, branches: As given.
        works: What this rank evaluates, at most; nothing on the last ranks if there is little.
        idle: How many ranks have nothing to evaluate.
        mine: (N, B, *S), the outputs of this rank by slot.
        everyone: (W, N, B, *S), those of all ranks.
    """

    def __init__(
        self,
        active: Sequence[bool],
        branches: int,
        shape: Sequence[int],
        *,
        rank: int,
        size: int,
        split_guidance: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.active, self.branches = tuple(active), branches
        shares = assign(active, branches, size, split_guidance=split_guidance)
        rows = [[row for work in share for row in work.rows] for share in shares]
        slots = max(map(len, rows))
        self.works = shares[rank]
        self.idle = sum(not share for share in shares)
        # zeros: a rank that failed before it evaluated anything still takes part
        self.mine = torch.zeros((slots, *shape), dtype=dtype, device=device)
        self.everyone = torch.zeros((size, slots, *shape), dtype=dtype, device=device)
        self._slots = {row: slot for slot, row in enumerate(rows[rank])}
        flat = self.everyone.flatten(0, 1)
        where = {
            row: owner * slots + slot
            for owner, owned in enumerate(rows)
            for slot, row in enumerate(owned)
        }
        self._outputs = [
            _evenly(flat, [where[m, k] for k in range(branches)]) if on else None
            for m, on in enumerate(active)
        ]

    @property
    def layout(self) -> bytes:
        """What must be the same on every rank, so that each finds the outputs of the others."""
        return repr((self.active, self.branches, self.everyone.shape, self.everyone.dtype)).encode()

    def put(self, work: Work, outputs: Sequence[Tensor]) -> None:
        """Write outputs of this rank, one (branches of `work`, B, *S) per objective of `work`.

        Raises:
            InvalidShape: They have a wrong shape or dtype.
        """
        count, dtype = work.stop - work.start, self.mine.dtype
        expected = (count, *self.mine.shape[1:])
        wrong = [o for o in outputs if o.shape != expected or o.dtype != dtype]
        if wrong or len(outputs) != len(work.objectives):
            found = wrong[0] if wrong else outputs[0]
            raise InvalidShape(
                f"{work} returned {len(outputs)} outputs, {found.dtype} {tuple(found.shape)}, "
                f"expected {dtype} {expected} for each objective"
            )
        for m, output in zip(work.objectives, outputs, strict=True):
            slot = self._slots[m, work.start]  # the branches of an objective are neighbours
            self.mine[slot : slot + count].copy_(output)

    def outputs(self) -> list[Tensor | None]:
        """Return M views (K, B, *S) of what was gathered last; None for inactive objectives."""
        return list(self._outputs)


def _evenly(rows: Tensor, where: Sequence[int]) -> Tensor:
    """View of one or two rows, which may lie on two ranks."""
    step = where[-1] - where[0] if len(where) > 1 else 1
    return rows[where[0] : where[-1] + 1 : step]

# SPDX-License-Identifier: Apache-2.0
"""What the engine's thread asks of whatever draws its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from msdda_fast.batching.ticket import Ticket

__all__ = ["Drawer", "Drawn", "Watcher"]

#: `f(step, steps, x_t)` after each step 1..steps, with the state (B, C, h, w) if somebody in the
#: batch wants previews; whether the batch goes on.
Watcher: TypeAlias = Callable[[int, int, Tensor | None], bool]


class Drawn(NamedTuple):
    """One image of a batch, and whether the safety checker blackened it."""

    image: Any
    is_flagged: bool


class Drawer(Protocol):
    """Draws batches of tickets of one shape; used by one thread only."""

    @property
    def device(self) -> torch.device:
        """The device that batches are drawn on."""

    def shared_networks(self) -> Iterable[nn.Module | None]:
        """The networks that a batch uses, and with which calls elsewhere wait for it."""

    def draw(
        self, batch: Sequence[Ticket], *, size: int, watch: Watcher, output_type: str
    ) -> Sequence[Drawn | None] | None:
        """Draw a batch.

        Args:
            batch: B tickets of one shape; copies of the last one pad the batch to `size`.
            size: Batch size to compute, >= B.
            watch: Called after each step, see `Watcher`; returning False ends the batch.
            output_type: As in a pipeline's call.

        Returns: For each ticket its image, or None where it is NaN or infinite; None in place of
            all of them if `watch` ended the batch.
        """

    def warm(self, ticket: Ticket, size: int, output_type: str) -> None:
        """Build all that a batch of `size` copies of a ticket needs, with as little work as may be.

        It shows, too, whether anything can be drawn.
        """

    def preview(self, x_t: Tensor, output_type: str) -> Sequence[Any]:
        """Return B images of states (B, C, h, w), as `watch` was given them."""

    def restart(self) -> None:
        """Give up every buffer and graph; the next batch builds them again."""

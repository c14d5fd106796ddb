# SPDX-License-Identifier: Apache-2.0
"""Counts of what an engine has done so far."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EngineStats", "Tally"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Every admitted image is waiting, being drawn, or has one of four outcomes.

    Attributes:
        waiting: Images in the queue.
        drawing: Images in the batch that is being drawn.
        completed, cancelled, timed_out, failed: Images, by outcome; an image that was not drawn
            because the engine was closed or failed counts as failed.
        refused: Images not admitted because the queue was full.
        batches: Batches drawn to the end.
        batch_sizes: How many of those batches had 1, 2, ... images, without padding.
        rows: Images computed in them, padding included.
        drawing_s: Time spent in them, seconds.
        failure: Why the engine failed for good; None: it has not.
        restarting: Why the engine is being restarted; None: it is not. Requests wait meanwhile.
        is_closed: Whether the engine accepts no more requests.
    """

    waiting: int
    drawing: int
    completed: int
    cancelled: int
    timed_out: int
    failed: int
    refused: int
    batches: int
    batch_sizes: Mapping[int, int]
    rows: int
    drawing_s: float
    failure: str | None
    is_closed: bool
    restarting: str | None = None


@dataclass(slots=True)
class Tally:
    """The counts behind `EngineStats`; thread-safe."""

    outcomes: Counter[str] = field(default_factory=Counter)
    batch_sizes: Counter[int] = field(default_factory=Counter)
    rows: int = 0
    drawing_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, outcome: str, images: int = 1) -> None:
        """Count images with an outcome, the name of a field of `EngineStats`."""
        with self._lock:
            self.outcomes[outcome] += images

    def count_batch(self, images: int, rows: int, seconds: float) -> None:
        """Count a batch that was drawn to the end."""
        with self._lock:
            self.batch_sizes[images] += 1
            self.rows += rows
            self.drawing_s += seconds

    def seconds_to_draw(self, images: int) -> float:
        """Estimate how long `images` take, by the batches so far; 1 s for each before the first."""
        with self._lock:
            if not (drawn := sum(size * times for size, times in self.batch_sizes.items())):
                return float(images)
            return images * self.drawing_s / drawn

    def snapshot(
        self,
        *,
        waiting: int,
        drawing: int,
        failure: str | None,
        restarting: str | None,
        is_closed: bool,
    ) -> EngineStats:
        """Return the counts together with the engine's current state."""
        with self._lock:
            return EngineStats(
                waiting=waiting,
                drawing=drawing,
                completed=self.outcomes["completed"],
                cancelled=self.outcomes["cancelled"],
                timed_out=self.outcomes["timed_out"],
                failed=self.outcomes["failed"],
                refused=self.outcomes["refused"],
                batches=self.batch_sizes.total(),
                batch_sizes=dict(self.batch_sizes),
                rows=self.rows,
                drawing_s=self.drawing_s,
                failure=failure,
                restarting=restarting,
                is_closed=is_closed,
            )

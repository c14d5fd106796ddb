# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: takes batches from the queue, draws them, resolves their futures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from msdda_fast.batching.drawing import BatchDrawer
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.request import GeneratedImage, Progress
from msdda_fast.batching.stats import Tally
from msdda_fast.batching.ticket import Chore, Ticket
from msdda_fast.errors import EngineClosed, EngineFailed, RequestTimeout

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

#: So many failed batches in a row say that no batch will do.
MOST_FAILURES = 3


class Worker(threading.Thread):
    """Draws until the queue is closed and empty; every future gets an outcome in any case.

    A batch that fails fails only its own tickets. `MOST_FAILURES` in a row, or an error outside a
    batch, stop the thread, fail all waiting tickets, and close the queue.

    Args:
        drawer: Runs on this thread only.
        queue, tally: Shared with the engine.
        sizes: Sizes that batches are padded to, increasing.
        output_type: Type of the images, as in the pipeline's call.

    Attributes:
        failure: Why the thread failed; None: it has not.
    """

    def __init__(
        self,
        drawer: BatchDrawer,
        queue: TicketQueue,
        tally: Tally,
        *,
        sizes: Sequence[int],
        output_type: str,
    ) -> None:
        super().__init__(name="msdda-engine", daemon=True)
        self._drawer, self._queue, self._tally = drawer, queue, tally
        self._sizes, self._output_type = sizes, output_type
        self._batch: list[Ticket] = []
        self._is_aborted = False
        self._failures = 0
        self.failure: str | None = None

    @property
    def drawing(self) -> int:
        """How many images are being drawn."""
        return len(self._batch)

    def run(self) -> None:
        """Take and draw batches until the queue is closed and empty, or the engine fails."""
        device = self._drawer.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                while (taken := self._queue.take()) is not None:
                    self._expire(taken.late)
                    if taken.chore is not None:
                        taken.chore.run()
                    if taken.batch:
                        self._batch = taken.batch
                        self._draw(taken.batch)
                        self._batch = []
        except BaseException as error:
            logger.exception("the engine failed and stops")
            self.failure = f"{type(error).__name__}: {error}"
            for item in [*self._batch, *self._queue.close(drain=False)]:
                self._fail(item, _failed("the engine failed and has stopped", error))
            self._batch = []

    def stop(self, *, drain: bool) -> None:
        """Close the queue; without `drain`, fail all tickets that wait or are being drawn."""
        self._is_aborted = self._is_aborted or not drain
        for item in self._queue.close(drain=drain):
            self._fail(item, _closed())

    def warm(self, ticket: Ticket, size: int) -> None:
        """Do one step of a batch of `size` copies of a ticket, and decode the result."""
        x = self._drawer.sample([ticket] * size, size=size, watch=lambda step, x: False)
        self._drawer.decode(x, self._output_type)

    def _draw(self, batch: list[Ticket]) -> None:
        start = time.monotonic()
        size = min(size for size in self._sizes if size >= len(batch))
        try:
            x_0 = self._drawer.sample(batch, size=size, watch=self._watch)
            if not any(ticket.is_open for ticket in batch):
                return
            images, flags = self._drawer.decode(x_0, self._output_type)
        except Exception as error:
            self._failures += 1
            if self._failures == MOST_FAILURES:
                raise
            logger.exception("a batch of %d images failed", len(batch))
            for ticket in batch:
                self._fail(ticket, _failed("the batch could not be drawn", error))
            return
        self._failures = 0
        drawn_s = time.monotonic() - start
        self._tally.count_batch(len(batch), size, drawn_s)
        for ticket, image, flag in zip(batch, images, flags, strict=True):
            if ticket.claim():
                self._tally.count("completed")
                ticket.future.set_result(
                    GeneratedImage(
                        image=image,
                        seed=ticket.seed,
                        is_flagged=flag,
                        batch_size=len(batch),
                        waited_s=start - ticket.arrived,
                        drawn_s=drawn_s,
                    )
                )

    def _watch(self, step: int, x: Tensor | None) -> bool:
        """Expire tickets and call `on_step`; return whether any ticket of the batch is open."""
        previews = {} if x is None else self._previews(step, x)
        now = time.monotonic()
        self._expire([*self._queue.late(), *(t for t in self._batch if t.expires <= now)])
        for row, ticket in enumerate(self._batch):
            if self._is_aborted:
                self._fail(ticket, _closed())
            if ticket.on_step is not None and ticket.is_open:
                try:
                    steps = ticket.shape.steps
                    ticket.on_step(Progress(ticket.index, step, steps, previews.get(row)))
                except Exception as error:
                    self._fail(ticket, error)
        return any(ticket.is_open for ticket in self._batch)

    def _previews(self, step: int, x: Tensor) -> dict[int, Any]:
        """Return previews by row for the tickets that want one; a failure is only logged."""
        rows = [
            row
            for row, ticket in enumerate(self._batch)
            if step in ticket.preview_steps and ticket.is_open
        ]
        try:
            images = self._drawer.preview(x[rows], self._output_type) if rows else ()
        except Exception:
            logger.exception("no previews after step %d", step)
            return {}
        return dict(zip(rows, images, strict=True))

    def _expire(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            waited = time.monotonic() - ticket.arrived
            self._fail(ticket, RequestTimeout(f"no image after {waited:.3g} s"), "timed_out")

    def _fail(self, item: Ticket | Chore, error: Exception, outcome: str = "failed") -> None:
        if isinstance(item, Chore):
            item.future.set_exception(error)
        elif item.claim():
            self._tally.count(outcome)
            item.future.set_exception(error)


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed before this image was drawn")


def _failed(what: str, error: BaseException) -> EngineFailed:
    failure = EngineFailed(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure

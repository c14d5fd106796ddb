# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: takes batches from the queue, draws them, resolves their futures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msdda_fast.batching.drawer import Drawer
from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.request import GeneratedImage, Progress
from msdda_fast.batching.stats import Tally
from msdda_fast.batching.ticket import Chore, Ticket, described, set_outcome
from msdda_fast.errors import EngineClosed, EngineFailed, RequestTimeout
from msdda_fast.pipelines.exclusive import is_mine

__all__ = ["Worker"]

logger = logging.getLogger(__name__)

NOT_FINITE = (
    "this image is NaN or infinite after the last step: an adapter, a weight outside "
    "its range or float16 overflow may be the cause"
)

#: Seconds before each attempt to start the drawer anew; after the last one the engine gives up.
BACK_OFF_S = (0.5, 1, 2, 4, 8, 16, 30)


class Worker(threading.Thread):
    """Draws until the queue is closed and empty; every future gets an outcome in any case.

    The images of a batch that fails are drawn again, each alone, once: a poisoned request costs its
    neighbours time and nothing else. If an image fails alone too, so does its request. Then a probe
    tells whether the fault was the request's, of its size for instance. If the probe cannot be
    drawn either, the drawer is started anew after each of `BACK_OFF_S`, until it can be; tickets
    wait, or expire, meanwhile. After the last attempt the thread ends, fails all waiting tickets
    and closes the queue.

    Args:
        drawer: Runs on this thread only.
        queue, tally: Shared with the engine.
        probe: Any drawer that works can draw it.
        sizes: Sizes that batches are padded to, increasing.
        output_type: Type of the images, as in the pipeline's call.

    Attributes:
        failure: Why the thread failed for good; None: it has not.
        restarting: Why the drawer is being started anew; None: it is not.
    """

    def __init__(
        self,
        drawer: Drawer,
        queue: TicketQueue,
        tally: Tally,
        *,
        probe: Ticket,
        sizes: Sequence[int],
        output_type: str,
    ) -> None:
        super().__init__(name="msdda-engine", daemon=True)
        self._drawer, self._queue, self._tally = drawer, queue, tally
        self._probe, self._sizes, self._output_type = probe, sizes, output_type
        self._taken: list[Ticket] = []
        self._aborted = threading.Event()
        self.failure: str | None = None
        self.restarting: str | None = None

    @property
    def drawing(self) -> int:
        """How many images are being drawn."""
        return len(self._taken)

    def run(self) -> None:
        """Take and draw batches until the queue is closed and empty, or the engine fails."""
        device = self._drawer.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                while self._do_next():
                    pass
        except BaseException as error:
            logger.exception("the engine failed and stops")
            self.failure, self.restarting = described(error), None
            for item in [*self._taken, *self._queue.close(drain=False)]:
                self._fail(item, _failed("the engine failed and has stopped", error))
            self._taken = []

    def waits_for_caller(self) -> bool:
        """Return whether the caller is on this thread, or in a call that uses its networks."""
        return self is threading.current_thread() or is_mine(self._drawer.shared_networks())

    def stop(self, *, drain: bool) -> None:
        """Close the queue; without `drain`, fail all tickets that wait or are being drawn."""
        rest = self._queue.close(drain=drain)
        if not drain:
            self._aborted.set()
            rest += self._taken
        for item in rest:
            self._fail(item, _closed())

    def warm(self, ticket: Ticket, size: int) -> None:
        """Build all that a batch of `size` copies of a ticket needs."""
        self._drawer.warm(ticket, size, self._output_type)

    def _do_next(self) -> bool:
        """Take and draw one batch, or whatever comes first; return False at the end.

        While it waits for the next one, nothing holds the last one's images.
        """
        if (taken := self._queue.take()) is None:
            return False
        self._expire(taken.late)
        if taken.chore is not None:
            taken.chore.run()
        if taken.batch:
            self._taken = taken.batch
            self._serve(taken.batch)
            self._taken = []
        return True

    def _serve(self, batch: list[Ticket]) -> None:
        if self._attempt(batch) is None:
            return
        for ticket in batch:
            if ticket.is_open and (error := self._attempt([ticket])) is not None:
                self._fail(ticket, _failed("the image could not be drawn, twice", error))
                if (error := self._try_probe()) is not None:
                    self._restart(error)

    def _attempt(self, batch: list[Ticket]) -> BaseException | None:
        """Draw a batch; return what it failed with."""
        try:
            self._draw(batch)
        except BaseException as error:  # the code of hooks and patches may raise anything
            logger.exception("a batch of %d images failed", len(batch))
            return error.with_traceback(None)  # whose frames hold the batch's memory
        return None

    def _try_probe(self) -> BaseException | None:
        try:
            self.warm(self._probe, self._sizes[0])
        except BaseException as error:
            logger.exception("the engine can draw nothing at present")
            return error.with_traceback(None)
        return None

    def _restart(self, reason: BaseException) -> None:
        """Start the drawer anew until it can draw the probe.

        Raises:
            BaseException: What the probe failed with after the last attempt.
        """
        error: BaseException | None = reason
        for seconds in BACK_OFF_S:
            self.restarting = described(reason)
            self._pause(seconds)
            if not self._is_needed():
                break
            self._drawer.restart()
            if (error := self._try_probe()) is None:
                logger.info("the engine draws again")
                break
        else:
            assert error is not None
            raise error
        self.restarting = None

    def _pause(self, seconds: float) -> None:
        """Wait, while tickets expire, until the time is up or nobody needs the engine any more."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._is_needed():
            self._aborted.wait(min(left, 0.1))
            self._expire_all()

    def _is_needed(self) -> bool:
        """Return whether anybody waits, or may still come."""
        if self._aborted.is_set():
            return False
        waits = len(self._queue) or any(ticket.is_open for ticket in self._taken)
        return bool(waits) or not self._queue.is_closed

    def _draw(self, batch: list[Ticket]) -> None:
        start = time.monotonic()
        size = min(size for size in self._sizes if size >= len(batch))
        images = self._drawer.draw(
            batch, size=size, watch=partial(self._watch, batch), output_type=self._output_type
        )
        if images is None:
            return
        drawn_s = time.monotonic() - start
        if any(images):
            self._tally.count_batch(len(batch), size, drawn_s)
        for ticket, drawn in zip(batch, images, strict=True):
            if drawn is None:
                self._fail(ticket, EngineFailed(NOT_FINITE))
            elif ticket.claim():
                self._tally.count("completed")
                outcome = GeneratedImage(
                    image=drawn.image,
                    seed=ticket.seed,
                    is_flagged=drawn.is_flagged,
                    batch_size=len(batch),
                    waited_s=start - ticket.arrived,
                    drawn_s=drawn_s,
                )
                set_outcome(ticket.future, outcome)

    def _watch(self, batch: list[Ticket], step: int, steps: int, x: Tensor | None) -> bool:
        """Expire tickets and call `on_step`; return whether any ticket of the batch is open."""
        previews = {} if x is None else self._previews(batch, step, x)
        self._expire_all()
        for row, ticket in enumerate(batch):
            if self._aborted.is_set():
                self._fail(ticket, _closed())
            if ticket.on_step is not None and ticket.is_open:
                try:
                    ticket.on_step(Progress(ticket.index, step, steps, previews.get(row)))
                except BaseException as error:
                    self._fail(ticket, _raised(error))
        return any(ticket.is_open for ticket in batch)

    def _previews(self, batch: list[Ticket], step: int, x: Tensor) -> dict[int, Any]:
        """Return previews by row for the tickets that want one; a failure is only logged."""
        rows = [
            row
            for row, ticket in enumerate(batch)
            if step in ticket.preview_steps and ticket.is_open
        ]
        try:
            images = self._drawer.preview(x[rows], self._output_type) if rows else ()
        except Exception:
            logger.exception("no previews after step %d", step)
            return {}
        return dict(zip(rows, images, strict=True))

    def _expire_all(self) -> None:
        now = time.monotonic()
        self._expire([*self._queue.late(), *(t for t in self._taken if t.expires <= now)])

    def _expire(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            waited = time.monotonic() - ticket.arrived
            self._fail(ticket, RequestTimeout(f"no image after {waited:.3g} s"), "timed_out")

    def _fail(self, item: Ticket | Chore, error: Exception, outcome: str = "failed") -> None:
        if isinstance(item, Chore):
            item.future.set_exception(error)
        elif item.claim():
            self._tally.count(outcome)
            set_outcome(item.future, error)


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed before this image was drawn")


def _failed(what: str, error: BaseException) -> EngineFailed:
    failure = EngineFailed(f"{what}: {described(error)}")
    failure.__cause__ = error
    return failure


def _raised(error: BaseException) -> Exception:
    """Return what a request ends with when its callback raised `error`.

    What means something else to whoever awaits the future, such as a cancellation, is wrapped.
    """
    if isinstance(error, Exception) and not isinstance(error, CancelledError | StopIteration):
        return error
    return _failed("on_step raised", error)

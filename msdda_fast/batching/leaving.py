# SPDX-License-Identifier: Apache-2.0
"""What becomes of images whose caller has left, and of an engine that nobody holds any more."""

from __future__ import annotations

import os
from concurrent.futures import Future
from weakref import ref

from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.request import GeneratedImage
from msdda_fast.batching.stats import Tally
from msdda_fast.batching.ticket import Ticket
from msdda_fast.batching.worker import Worker

__all__ = ["end", "left"]


def end(worker: Worker, process: int) -> None:
    """End a worker of this process once it has drawn what was admitted."""
    if process == os.getpid():
        worker.stop(drain=True)


def left(
    queue: TicketQueue, tally: Tally, place: ref[Ticket], future: Future[GeneratedImage]
) -> None:
    """Take a ticket whose future is done out of the queue, if it was cancelled.

    A future keeps its callbacks: if one held the ticket, which holds the future and images, they
    would stay in memory until Python looks for cycles.
    """
    ticket = place()
    if ticket is not None and future.cancelled():
        ticket.claim()  # tells those who wait for it
        tally.count("cancelled")
        queue.remove(ticket)

# SPDX-License-Identifier: Apache-2.0
"""The queue of tickets: bounded, first in first out, handed out in batches of one shape."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msdda_fast.batching.ticket import Chore, Ticket
from msdda_fast.errors import EngineClosed, QueueFull

__all__ = ["Taken", "TicketQueue"]


@dataclass(frozen=True, slots=True)
class Taken:
    """What the engine does next: draw a batch, do a chore, or expire late tickets."""

    batch: list[Ticket] = field(default_factory=list)
    late: list[Ticket] = field(default_factory=list)
    chore: Chore | None = None


class TicketQueue:
    """A thread-safe queue of tickets, taken out in batches.

    A batch has the oldest ticket and the next oldest of the same shape. It is handed out when it is
    full, when its oldest ticket has waited `max_wait_s` for others to join, or when tickets of
    another shape are waiting: then there is no point in idling.

    Args:
        max_batch: Most tickets in a batch.
        max_wait_s: Longest time a ticket waits for others to join its batch, seconds.
        limit: Most tickets in the queue; also an attribute.
        clock: Returns monotonic time in seconds.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_wait_s: float,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_batch, self._max_wait_s, self.limit = max_batch, max_wait_s, limit
        self._clock = clock
        self._tickets: deque[Ticket] = deque()
        self._chores: deque[Chore] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def is_closed(self) -> bool:
        """Whether the queue is closed to new tickets."""
        return self._is_closed

    def check_room(self, count: int) -> None:
        """Check that `count` more tickets fit.

        Raises:
            QueueFull: They do not fit.
            EngineClosed: The queue is closed.
        """
        with self._changed:
            self._check_open()
            if len(self._tickets) + count > self.limit:
                raise QueueFull(
                    f"{len(self._tickets)} of at most {self.limit} images are waiting, "
                    f"{count} more were requested"
                )

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Add all tickets, or none.

        Raises:
            QueueFull: They do not fit.
            EngineClosed: The queue is closed.
        """
        with self._changed:
            self.check_room(len(tickets))
            self._tickets.extend(tickets)
            self._changed.notify_all()

    def add(self, chore: Chore) -> None:
        """Add a chore, to be done before the next batch.

        Raises:
            EngineClosed: The queue is closed.
        """
        with self._changed:
            self._check_open()
            self._chores.append(chore)
            self._changed.notify_all()

    def remove(self, ticket: Ticket) -> None:
        """Remove a ticket, if it is still in the queue."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def late(self) -> list[Ticket]:
        """Remove and return the tickets that have expired."""
        with self._changed:
            now = self._clock()
            late = [ticket for ticket in self._tickets if ticket.expires <= now]
            for ticket in late:
                self._tickets.remove(ticket)
            return late

    def close(self, *, drain: bool) -> list[Ticket | Chore]:
        """Close the queue; remove and return its chores and, without `drain`, its tickets."""
        with self._changed:
            self._is_closed = True
            rest: list[Ticket | Chore] = [*self._chores]
            self._chores.clear()
            if not drain:
                rest += self._tickets
                self._tickets.clear()
            self._changed.notify_all()
            return rest

    def take(self) -> Taken | None:
        """Wait for the next thing to do; return None when the queue is closed and empty."""
        with self._changed:
            while True:
                if late := self.late():
                    return Taken(late=late)
                if self._chores:
                    return Taken(chore=self._chores.popleft())
                now, wait = self._clock(), math.inf
                if self._tickets:
                    batch = self._first_batch()
                    company_until = batch[0].arrived + self._max_wait_s
                    if self._is_complete(batch) or now >= company_until:
                        for ticket in batch:
                            self._tickets.remove(ticket)
                        return Taken(batch=batch)
                    wait = min(company_until, *(t.expires for t in self._tickets)) - now
                elif self._is_closed:
                    return None
                self._changed.wait(None if wait == math.inf else wait)

    def _first_batch(self) -> list[Ticket]:
        shape = self._tickets[0].shape
        alike = [ticket for ticket in self._tickets if ticket.shape == shape]
        return alike[: self._max_batch]

    def _is_complete(self, batch: list[Ticket]) -> bool:
        others_wait = len(batch) < len(self._tickets)
        return len(batch) == self._max_batch or others_wait or self._is_closed

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("the engine is closed and accepts no more requests")

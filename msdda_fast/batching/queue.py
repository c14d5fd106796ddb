# SPDX-License-Identifier: Apache-2.0
"""The queue of tickets: bounded, fair to its clients, handed out in batches of one shape."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from msdda_fast.batching.limits import Limits
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

    Clients take turns. A batch has the oldest ticket of the client whose turn it is; then every
    client adds its next ticket of the same shape, round after round. It is handed out when it is
    full, when its oldest ticket has waited `max_wait_ms` for others to join, or when tickets of
    another shape are waiting: then there is no point in idling.

    Nobody fills the queue alone: a client may have `client_limit` tickets in it, and no more than
    there are places left. So whoever has none finds a place, however many greedy clients there are.
    Tickets of no client (None) take turns as one more client, and only `limit` holds for them.

    Args:
        limits: Those of the engine.
        clock: Returns monotonic time in seconds.

    Attributes:
        limit, client_limit: Most tickets in the queue, and of one client.
    """

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_batch, self._max_wait_s = limits.max_batch, limits.max_wait_ms / 1e3
        self.limit, self.client_limit = limits.queue_limit, limits.client_limit
        self._clock = clock
        # the client whose turn it is comes first; one with no tickets is not there
        self._lines: dict[str | None, deque[Ticket]] = {}
        self._chores: deque[Chore] = deque()
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return sum(map(len, list(self._lines.values())))

    @property
    def is_closed(self) -> bool:
        """Whether the queue is closed to new tickets."""
        return self._is_closed

    def check_room(self, count: int, client: str | None = None) -> None:
        """Check that `count` more tickets of a client fit.

        Raises:
            QueueFull: They do not fit; its `client` is None if they are more than `limit` allows.
            EngineClosed: The queue is closed.
        """
        with self._changed:
            self._check_open()
            total, own = len(self), len(self._lines.get(client, ()))
            if total + count > self.limit:
                raise QueueFull(
                    f"{total} of at most {self.limit} images are waiting, "
                    f"{count} more were requested"
                )
            most = min(self.client_limit, self.limit - total)
            if client is not None and own + count > most:
                error = QueueFull(
                    f"client {client!r} has {own} images waiting and may have {most} at present, "
                    f"{count} more were requested"
                )
                error.client = client
                raise error

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Add all tickets of one client, or none.

        Raises:
            QueueFull: They do not fit.
            EngineClosed: The queue is closed.
        """
        with self._changed:
            client = tickets[0].client
            self.check_room(len(tickets), client)
            self._lines.setdefault(client, deque()).extend(tickets)
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
            if ticket in self._lines.get(ticket.client, ()):
                self._take_out(ticket)
                self._changed.notify_all()

    def late(self) -> list[Ticket]:
        """Remove and return the tickets that have expired."""
        with self._changed:
            now = self._clock()
            late = [ticket for ticket in self._tickets() if ticket.expires <= now]
            for ticket in late:
                self._take_out(ticket)
            return late

    def close(self, *, drain: bool) -> list[Ticket | Chore]:
        """Close the queue; remove and return its chores and, without `drain`, its tickets."""
        with self._changed:
            self._is_closed = True
            rest: list[Ticket | Chore] = [*self._chores]
            self._chores.clear()
            if not drain:
                rest += self._tickets()
                self._lines.clear()
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
                if self._lines:
                    batch = self._next_batch()
                    company_until = min(t.arrived for t in batch) + self._max_wait_s
                    if self._is_complete(batch) or now >= company_until:
                        for ticket in batch:
                            self._serve(ticket)
                        return Taken(batch=batch)
                    wait = min(company_until, *(t.expires for t in self._tickets())) - now
                elif self._is_closed:
                    return None
                self._changed.wait(None if wait == math.inf else min(wait, threading.TIMEOUT_MAX))

    def _next_batch(self) -> list[Ticket]:
        first = next(iter(self._lines.values()))[0]
        alike = ([t for t in line if self._may_share(first, t)] for line in self._lines.values())
        rounds = chain.from_iterable(zip_longest(*alike))
        return [ticket for ticket in rounds if ticket is not None][: self._max_batch]

    def _may_share(self, first: Ticket, other: Ticket) -> bool:
        return other.shape == first.shape

    def _serve(self, ticket: Ticket) -> None:
        """Take a ticket out; its client's next turn comes after everybody else's."""
        self._take_out(ticket)
        if (line := self._lines.pop(ticket.client, None)) is not None:
            self._lines[ticket.client] = line

    def _take_out(self, ticket: Ticket) -> None:
        line = self._lines[ticket.client]
        line.remove(ticket)
        if not line:
            del self._lines[ticket.client]

    def _tickets(self) -> list[Ticket]:
        return list(chain.from_iterable(self._lines.values()))

    def _is_complete(self, batch: list[Ticket]) -> bool:
        others_wait = len(batch) < len(self)
        return len(batch) == self._max_batch or others_wait or self._is_closed

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("the engine is closed and accepts no more requests")

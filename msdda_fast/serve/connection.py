# SPDX-License-Identifier: Apache-2.0
"""Protection from clients that do not speak HTTP, send or read it slowly, or are too many."""

from __future__ import annotations

import asyncio
import json
import resource
from functools import cache
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from msdda_fast.serve.hosts import address_of
from msdda_fast.serve.refusals import Refusal

__all__ = ["Connection"]

#: Seconds from the first byte of a request, or from the connection, until all of it must be there.
RECEIVING_S = 30.0

#: Seconds in which a client reads nothing of its answer, after which it is cut off.
STALLED_S = 10.0
#: Seconds between two looks at what a connection does.
LOOK_S = 1.0

#: Most connections, if so many file descriptors are allowed; a quarter of them from one address.
MOST = 1024
#: Descriptors that are left for everything else.
RESERVED = 128


@cache
def most_connections() -> int:
    """Return the bound on connections of this process, below its limit of descriptors."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if limit == resource.RLIM_INFINITY else max(8, min(MOST, limit - RESERVED))


class Connection(H11Protocol):
    """uvicorn's protocol, with limits on the time of a request and on the number of connections.

    Without them, clients that send or read little or nothing would hold connections until file
    descriptors run out. A connection too many replaces the oldest one that waits for its client.
    A client that has ended its side after a request gets its answer. Invalid HTTP is answered with
    JSON, as every refusal is.
    """

    _late: asyncio.TimerHandle | None = None
    _looking: asyncio.TimerHandle | None = None
    _is_half_closed = False
    _unsent = 0  # bytes, at the last look
    _heard_at = _moved_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request, if there is room for one more client."""
        super().connection_made(transport)
        self._heard_at = self._moved_at = self.loop.time()
        if not self._make_room():
            message = "too many connections"
            refusal = Refusal(503, message, code="too_many_connections", kind="server_error")
            self._answer(refusal, b"Service Unavailable")
            return
        self._watch()
        self._looking = self.loop.call_later(LOOK_S, self._look)

    def data_received(self, data: bytes) -> None:
        """Stop the clock if the request is complete, else start it if it is not running."""
        self._heard_at = self.loop.time()
        super().data_received(data)
        self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the answers that are being drawn.

        Whether the client has ended its side or has gone looks the same from here, until something
        is sent: see `_probe`.
        """
        self._is_half_closed = self._is_answering
        return self._is_half_closed

    def on_response_complete(self) -> None:
        """Close, if the client sends no more."""
        super().on_response_complete()
        if self._is_half_closed and not self._is_answering:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_watching()
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP."""
        refusal = Refusal(400, "the request is not valid HTTP", code="invalid_http")
        self._answer(refusal, b"Bad Request")

    def _answer(self, refusal: Refusal, reason: bytes) -> None:
        content = json.dumps(refusal.body).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("connection", "close"),
        ]
        try:
            events: list[Any] = [
                h11.Response(status_code=refusal.status, headers=headers, reason=reason),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # in the middle of an answer: there is no place for another one
        self.transport.close()

    @property
    def _is_answering(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    @property
    def _waits_for_client(self) -> bool:
        return not self._is_answering or self.flow.write_paused

    def _make_room(self) -> bool:
        """Return whether there is room for this connection, after closing an older one if not."""
        most, mine = most_connections(), address_of(self.client)
        others = [
            one for one in self.connections if isinstance(one, Connection) and one is not self
        ]
        alike = [one for one in others if address_of(one.client) == mine]
        full = others if len(others) >= most else alike if len(alike) >= most // 4 else None
        if full is None:
            return True
        waiting = [one for one in full if one._waits_for_client]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda one: one._heard_at)
        oldest.transport.abort()
        self.connections.discard(oldest)  # now: its end is told later
        return True

    def _look(self) -> None:
        """Cut the connection off if the client reads nothing, or has gone."""
        now, unsent = self.loop.time(), self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        if now - self._moved_at > STALLED_S:
            self.transport.abort()
            return
        if self._is_half_closed:
            self._probe()
        self._looking = self.loop.call_later(LOOK_S, self._look)

    def _probe(self) -> None:
        """Send what every client skips; from one that has gone, the system answers with an end."""
        is_new = self.conn.their_http_version not in (None, b"1.0")
        if is_new and self.conn.our_state is h11.SEND_RESPONSE:
            event = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(event) or b"")

    def _watch(self) -> None:
        if self._is_answering:
            self._stop_watching()
        elif self._late is None:
            self._late = self.loop.call_later(RECEIVING_S, self._give_up)

    def _give_up(self) -> None:
        self._late = None
        self.transport.close()

    def _stop_watching(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

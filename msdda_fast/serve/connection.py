# SPDX-License-Identifier: Apache-2.0
"""Protection from clients that do not speak HTTP, or send it one byte at a time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from msdda_fast.serve.refusals import Refusal

__all__ = ["Connection"]

#: Seconds from the first byte of a request, or from the connection, until all of it must be there.
RECEIVING_S = 30.0


class Connection(H11Protocol):
    """uvicorn's protocol, with a limit on how long a request may take to arrive.

    Without it, clients that send little or nothing would hold connections until file handles run
    out. Invalid HTTP is answered with JSON, as every refusal is.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the clock if the request is complete, else start it if it is not running."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP."""
        refusal = Refusal(400, "the request is not valid HTTP", code="invalid_http")
        content = json.dumps(refusal.body).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(content))),
            ("connection", "close"),
        ]
        try:
            events: list[Any] = [
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # in the middle of an answer: there is no place for another one
        self.transport.close()

    def _watch(self) -> None:
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
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

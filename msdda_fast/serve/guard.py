# SPDX-License-Identifier: Apache-2.0
"""Checks before every route: host, API key, length of bodies. Logs and names every request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msdda_fast.serve.hosts import address_of, is_this_machine
from msdda_fast.serve.metrics import Metrics
from msdda_fast.serve.refusals import Refusal
from msdda_fast.serve.settings import ServeSettings

__all__ = ["Guard"]

logger = logging.getLogger("msdda_fast.serve")

#: Characters of a path that the log keeps.
MOST_PATH = 200

#: What needs the key, where there is one.
GUARDED = ("/v1/", "/metrics", "/docs", "/openapi.json")

#: The route whose bodies have images.
WITH_IMAGES = "/v1/images/edits"

#: Bytes of a refused body that are read and dropped: a client that is still sending when the
#: connection closes never sees why.
MOST_DROPPED = 64 * 2**20


class Guard:
    """ASGI middleware that checks and logs requests.

    It names each: `X-Request-ID` of the answer, `request_id` in the log. `state.client` of a
    request is who it is drawn for: the key, if there are several, else the address.

    Args:
        app: The app to guard.
        settings: The API keys, the longest body, and whose name requests must give as host.
        metrics: Counts the refusals.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = [_digest(key, "utf-8") for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, closes = time.monotonic(), 0, False
        fields: dict[str, Any] = {"request_id": f"req_{secrets.token_hex(16)}"}
        scope.setdefault("state", {})["log"] = fields

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", fields["request_id"].encode())]
                if closes or status == 413:
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        async def refuse(refusal: Refusal) -> None:
            fields["error"] = refusal.code
            self._metrics.refusals.labels(refusal.code).inc()
            challenge = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
            await refusal.response(challenge)(scope, receive, answer)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, self._bounded(receive, self._longest(scope)), answer)
                return
            closes = True
            if refusal.code != "invalid_http" and "expect" not in Headers(scope=scope):
                await _drop(receive)
            await refuse(refusal)
        except asyncio.CancelledError:  # the time for finishing is over
            if status:
                raise
            closes = True
            await refuse(Refusal.stopping(1))
        except Exception:
            logger.exception("a request failed")
            if status:
                raise  # there is no place for another answer: the connection is cut
            await refuse(Refusal(500, "internal error", code="internal", kind="server_error"))
        finally:
            spent = time.monotonic() - start
            entry = {"method": scope["method"], "path": scope["path"][:MOST_PATH], "status": status}
            entry |= {"seconds": round(spent, 4), **fields}
            logger.info("request", extra={"fields": entry})

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            # two servers that read such a request may disagree on where the next one begins
            message = "a request has Content-Length or Transfer-Encoding, not both"
            return Refusal(400, message, code="invalid_http")
        if self._settings.is_local and not is_this_machine(headers.get("host", "localhost")):
            message = "this service listens on loopback only: ask for localhost, not another host"
            return Refusal(403, message, code="foreign_host")
        client = address_of(scope.get("client"))
        if self._keys and scope["path"].startswith(GUARDED):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            # digests are of one length: how long the comparison takes says nothing of the key
            sent = _digest(token.strip(), "latin-1")
            known = [i for i, key in enumerate(self._keys) if hmac.compare_digest(sent, key)]
            is_known = bool(known)
            if scheme.lower() != "bearer" or not is_known:
                return Refusal(401, "missing or wrong API key", code="invalid_api_key")
            if len(self._keys) > 1:
                client = f"key {known[0]}"
        scope["state"]["client"] = client
        length, most = headers.get("content-length", "0"), self._longest(scope)
        # int() reads no more than some thousand digits
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            return Refusal(413, _too_long(most), code="body_too_large")
        return None

    def _longest(self, scope: Scope) -> int:
        """Return how many bytes a body may have."""
        settings = self._settings
        has_images = scope["path"] == WITH_IMAGES
        return settings.max_image_bytes if has_images else settings.max_body_bytes

    def _bounded(self, receive: Receive, most: int) -> Receive:
        """Enforce the limit on what is actually received, whatever the header claims."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                if message.get("more_body"):
                    await _drop(receive)
                raise HTTPException(413, _too_long(most))
            return message

        return bounded


async def _drop(receive: Receive) -> None:
    """Read the rest of a body, up to a bound."""
    read = 0
    while read <= MOST_DROPPED:
        message = await receive()
        read += len(message.get("body", ()))
        if not message.get("more_body"):
            return


def _too_long(most: int) -> str:
    return f"the body is longer than {most} bytes"


def _digest(text: str, encoding: str) -> bytes:
    return hashlib.sha256(text.encode(encoding)).digest()

# SPDX-License-Identifier: Apache-2.0
"""Checks before every route: the API key and the length of bodies. Logs every request."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msdda_fast.serve.metrics import Metrics
from msdda_fast.serve.refusals import Refusal
from msdda_fast.serve.settings import ServeSettings

__all__ = ["Guard"]

logger = logging.getLogger("msdda_fast.serve")

#: Characters of a path that the log keeps.
MOST_PATH = 200

#: What needs the key, where there is one.
GUARDED = ("/v1/", "/metrics")


class Guard:
    """ASGI middleware that checks and logs requests.

    Args:
        app: The app to guard.
        settings: The API key, if any, and the longest body.
        metrics: Counts the refusals.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = fields

        async def answer(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, self._bounded(receive), answer)
                return
            self._metrics.refusals.labels(refusal.code).inc()
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
            await refusal.response({**headers, "Connection": "close"})(scope, receive, answer)
        finally:
            spent = time.monotonic() - start
            entry = {"method": scope["method"], "path": scope["path"][:MOST_PATH], "status": status}
            entry |= {"seconds": round(spent, 4), **fields}
            logger.info("request", extra={"fields": entry})

    def _refusal(self, scope: Scope) -> Refusal | None:
        headers = Headers(scope=scope)
        key = self._settings.api_key
        if key is not None and scope["path"].startswith(GUARDED):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            # digests are of one length: how long the comparison takes says nothing of the key
            is_known = hmac.compare_digest(_digest(token.strip(), "latin-1"), _digest(key, "utf-8"))
            if scheme.lower() != "bearer" or not is_known:
                return Refusal(401, "missing or wrong API key", code="invalid_api_key")
        length = headers.get("content-length", "0")
        most = self._settings.max_body_bytes
        # int() reads no more than some thousand digits
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            return Refusal(413, self._too_long(), code="body_too_large")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """Enforce the limit on what is actually received, whatever the header claims."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._settings.max_body_bytes:
                raise HTTPException(413, self._too_long())
            return message

        return bounded

    def _too_long(self) -> str:
        return f"the body is longer than {self._settings.max_body_bytes} bytes"


def _digest(text: str, encoding: str) -> bytes:
    return hashlib.sha256(text.encode(encoding)).digest()

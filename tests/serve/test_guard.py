# SPDX-License-Identifier: Apache-2.0
"""What stands before the routes, without a server that puts pieces of a body together."""

import asyncio

import pytest
from starlette.exceptions import HTTPException

from msdda_fast.serve.guard import Guard
from msdda_fast.serve.metrics import Metrics
from msdda_fast.serve.settings import ServeSettings
from tests.serve.conftest import SETTINGS


def test_the_pieces_of_a_body_count_together():
    settings, read = ServeSettings(**SETTINGS), []
    piece = b"a" * (settings.max_body_bytes // 3)

    async def receive():
        return {"type": "http.request", "body": piece, "more_body": True}

    async def app(scope, receive, send):
        while len(read) < 10:
            read.append(await receive())

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    with pytest.raises(HTTPException, match="longer than") as refused:
        asyncio.run(Guard(app, settings, Metrics())(scope, receive, None))
    assert refused.value.status_code == 413 and len(read) == 3

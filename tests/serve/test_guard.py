# SPDX-License-Identifier: Apache-2.0
"""What stands before the routes, without a server that puts pieces of a body together."""

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException

from msdda_fast.serve import guard
from msdda_fast.serve.guard import Guard
from msdda_fast.serve.hosts import address_of, is_this_machine
from msdda_fast.serve.metrics import Metrics
from msdda_fast.serve.settings import ServeSettings, public_name
from tests.serve.conftest import SETTINGS


class Asked:
    """One request to a guarded app, and what became of it."""

    def __init__(self, app, *, path="/v1/x", pieces=(b"",), headers=(), peer=None, **settings):
        self.pieces, self.status, self.body, self.read = list(pieces), None, b"", 0
        self.scope = {
            "type": "http", "method": "POST", "path": path, "client": peer,
            "headers": [(k.lower().encode(), v.encode()) for k, v in dict(headers).items()],
        }  # fmt: skip
        settings = ServeSettings(**{**SETTINGS, **settings})
        asyncio.run(Guard(app, settings, Metrics())(self.scope, self.receive, self.send))
        self.error = json.loads(self.body)["error"] if self.status != 200 else None

    async def receive(self):
        self.read += 1
        if len(self.pieces) == 1:
            return {"type": "http.request", "body": self.pieces[0], "more_body": False}
        return {"type": "http.request", "body": self.pieces.pop(0), "more_body": True}

    async def send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        self.body += message.get("body", b"")


async def fine(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_the_pieces_of_a_body_count_together():
    most, seen = ServeSettings(**SETTINGS).max_body_bytes, []

    async def app(scope, receive, send):
        with pytest.raises(HTTPException, match="longer than") as refused:
            while True:
                seen.append(await receive())
        assert refused.value.status_code == 413
        await fine(scope, receive, send)

    asked = Asked(app, pieces=[b"a" * (most // 3)] * 10)
    assert asked.status == 200 and len(seen) == 3
    assert asked.read == 10  # the client could send to its end


class TestRefusedBodies:
    LONG = (("Content-Length", "9999999"),)

    def test_are_read_to_their_end_before_the_answer(self):
        asked = Asked(fine, pieces=[b"a" * 1000] * 50, headers=self.LONG)
        assert asked.status == 413 and asked.read == 50 and asked.headers["connection"] == "close"

    def test_up_to_a_bound(self, monkeypatch):
        monkeypatch.setattr(guard, "MOST_DROPPED", 5000)
        asked = Asked(fine, pieces=[b"a" * 1000] * 50, headers=self.LONG)
        assert asked.status == 413 and asked.read == 6

    def test_are_not_asked_for(self):
        asked = Asked(fine, headers=[*self.LONG, ("Expect", "100-continue")])
        assert asked.status == 413 and asked.read == 0

    def test_of_callers_without_a_key(self):
        asked = Asked(fine, pieces=[b"a"] * 9, api_key="k")
        assert asked.status == 401 and asked.read == 9


def test_two_lengths_are_refused_and_the_connection_closed():
    headers = {"Content-Length": "3", "Transfer-Encoding": "chunked"}
    asked = Asked(fine, pieces=[b"x"] * 9, headers=headers)
    assert asked.status == 400 and asked.error["code"] == "invalid_http" and asked.read == 0
    assert asked.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("localhost:8000", True), ("LOCALHOST.", True), ("a.localhost", True),
        ("127.0.0.1:8000", True), ("127.9.9.9", True), ("[::1]:8000", True), ("::1", True),
        ("evil.example", False), ("evil.example:8000", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False), ("10.0.0.1", False), ("[::2]:80", False), ("", False),
        ("notlocalhost", False),
    ],
)  # fmt: skip
def test_on_loopback_only_names_of_this_machine_are_hosts(host, local):
    assert is_this_machine(host) == local
    for path in ("/v1/x", "/health", "/"):
        asked = Asked(fine, path=path, headers={"Host": host}, is_local=True)
        assert asked.status == (200 if local else 403)
        assert local or asked.error["code"] == "foreign_host"
        assert Asked(fine, path=path, headers={"Host": host}).status == 200


class TestKeys:
    def test_spaces_around_a_key_do_not_count(self):
        for sent in ("Bearer k", "Bearer  k "):
            assert Asked(fine, headers={"Authorization": sent}, api_key=" k\n").status == 200

    @pytest.mark.parametrize("key", ["", " \n", "a\x00b", "a\tb", "a\rb"], ids=ascii)
    def test_that_nobody_can_send_are_refused_at_the_start(self, key):
        with pytest.raises(ValueError, match="API key"):
            ServeSettings(model="x", api_key=key)

    def test_several_open_and_tell_clients_apart(self):
        def client(key):
            asked = Asked(
                fine, headers={"Authorization": f"Bearer {key}"}, peer=("10.0.0.1", 5),
                api_key="one\ntwo\n",
            )  # fmt: skip
            return asked.status, asked.scope["state"].get("client")

        assert client("one") == (200, "key 0") and client("two") == (200, "key 1")
        assert client("three")[0] == client("one\ntwo")[0] == 401

    @pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/metrics", "/v1/models"])
    def test_guard_what_describes_the_service(self, path):
        assert Asked(fine, path=path, api_key="k").status == 401
        assert Asked(fine, path=path).status == 200


def test_clients_are_told_apart_by_their_address():
    assert Asked(fine, peer=("10.0.0.1", 5)).scope["state"]["client"] == "10.0.0.1"
    assert address_of(("2001:db8::1", 1)) == address_of(("2001:db8::ffff:2", 1))
    assert address_of(("2001:db8::1", 1)) != address_of(("2001:db8:0:1::1", 1))
    assert address_of(("::ffff:10.0.0.1", 1)) == "10.0.0.1" and address_of(None) == "unknown"


def test_every_answer_has_its_id_and_the_log_too(caplog):
    async def broken(scope, receive, send):
        raise ZeroDivisionError("/secret")

    with caplog.at_level("INFO", logger="msdda_fast.serve"):
        asked = [Asked(fine), Asked(broken), Asked(fine, api_key="k")]
    assert [one.status for one in asked] == [200, 500, 401]
    assert asked[1].error["code"] == "internal" and b"secret" not in asked[1].body
    ids = [one.headers["x-request-id"] for one in asked]
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [entry["request_id"] for entry in fields] == ids and len({*ids}) == 3
    assert [entry["status"] for entry in fields] == [200, 500, 401]


def test_a_request_that_is_given_up_at_the_end_is_told_so():
    async def given_up(scope, receive, send):
        raise asyncio.CancelledError

    asked = Asked(given_up)
    assert asked.status == 503 and asked.error["code"] == "unavailable"
    assert asked.headers["retry-after"] == "1" and asked.headers["connection"] == "close"


def test_a_folder_is_served_under_its_name(tmp_path):
    (tmp_path / "secret" / "mine").mkdir(parents=True)
    assert public_name(str(tmp_path / "secret" / "mine")) == "mine"
    assert public_name(f"{tmp_path}/secret/mine/") == "mine"
    assert public_name("msdda-fast/emoji") == "msdda-fast/emoji"

# SPDX-License-Identifier: Apache-2.0
"""Clients that lie about lengths, never finish, or send what is no HTTP: answered or cut off."""

import json
import logging
import re
import socket
import threading
import time

import httpx2
import pytest

from msdda_fast.batching.drawing import BatchDrawer
from msdda_fast.serve import connection
from msdda_fast.serve.logs import JSONLines
from tests.serve.conftest import SOON, until

BODY = b'{"prompt": "a dog", "steps": 1}'
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

FORM = POST.replace(b"generations", b"edits").replace(
    b"application/json", b"multipart/form-data; boundary=b"
)
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nPNG'


def raw(running, data, *, finish=False):
    """Everything that the server answers to bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", httpx2.URL(running.url).port), SOON) as client:
        client.sendall(data)
        if finish:
            client.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := client.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer


def statuses(answer):
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", answer)]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "RECEIVING_S", 0.3)


class TestHTTP:
    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40,  # TLS
            b"FOO\r\n\r\n",
            b"GET /health HTTP/1.1\r\n\r\n",  # no host
            POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            POST + b"Content-Length: -1\r\n\r\n",
            POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
            POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nxyz\r\n\r\n",
            POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
            POST + b"X: y\r\n" * 20_000 + b"\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        ],
        ids=lambda data: ascii(data[:60])[:60] + str(len(data)),
    )
    def test_what_is_no_http_or_too_much_is_refused_in_json(self, served, data):
        answer = raw(served, data, finish=True)
        assert statuses(answer)[0] in (400, 404, 413) or not answer
        if answer:
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error.keys() == {"type", "message", "param", "code"}
        assert served.draw(steps=1).status_code == 200

    def test_pipelined_requests_are_answered_in_turn(self, served):
        head = POST + b"Content-Length: %d\r\n" % len(BODY)
        data = (head + b"\r\n" + BODY) * 3 + head + b"Connection: close\r\n\r\n" + BODY
        assert statuses(raw(served, data)) == [200] * 4

    def test_slashes_lead_nowhere(self, served):
        """No redirect to a host that the client names."""
        for method, path in (("GET", "/health/"), ("POST", "/v1/images/generations/")):
            answer = served.http.request(method, path, headers={"Host": "evil.example"})
            assert answer.status_code == 404 and "location" not in answer.headers

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
    def test_json_in_another_encoding_is_read_or_refused(self, served, encoding):
        headers = {"content-type": "application/json"}
        body = BODY.decode().encode(encoding)
        answer = served.http.post("/v1/images/generations", content=body, headers=headers)
        assert answer.status_code in (200, 400)


class TestSlowness:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"POST /v1",
            POST + b"Content-Length: 40\r\n\r\n" + b"{",
            POST + b"X: y\r\n",
            FORM + b"Content-Length: 4000\r\n\r\n" + PART,
        ],
        ids=["nothing", "line", "body", "headers", "form"],
    )
    def test_a_request_that_does_not_arrive_is_given_up(self, serve, impatient, data):
        running, start = serve(), time.monotonic()
        answer = raw(running, data)
        assert time.monotonic() - start > 0.25
        assert 200 not in statuses(answer)
        until(lambda: not running._server.server_state.connections)

    def test_bytes_now_and_then_do_not_help(self, serve, impatient):
        running = serve()
        port = httpx2.URL(running.url).port
        with socket.create_connection(("127.0.0.1", port), SOON) as client:
            client.sendall(POST)

            def is_cut_off():
                try:
                    client.sendall(b"X: y\r\n")
                except OSError:
                    return True
                return time.sleep(0.02)

            until(is_cut_off)

    @pytest.mark.full  # waits
    def test_a_drawing_that_takes_long_is_not_given_up(self, serve, impatient):
        running = serve()
        with httpx2.Client(base_url=running.url, timeout=SOON) as client:
            for _ in range(2):  # on one connection, which lives longer than the limit
                body = {"prompt": "a", "steps": 50}
                start = time.monotonic()
                assert client.post("/v1/images/generations", json=body).status_code == 200
                time.sleep(max(0.0, 0.4 - (time.monotonic() - start)))


class TestSecrets:
    def test_neither_key_nor_prompt_is_logged_whatever_goes_wrong(self, serve, caplog, monkeypatch):
        def fail(self, *arguments, **options):
            raise RuntimeError("no")

        running = serve(settings={"api_key": "hush-hush"})
        key = {"Authorization": "Bearer hush-hush"}
        with caplog.at_level(logging.DEBUG):
            for body in (
                {"prompt": "sesame"},
                {"prompt": "sesame", "n": 0},
                {"prompt": "sesame " * 99},
                {"prompt": "a", "weights": {"sesame": 1}},
                {"prompt": "a", "sesame": 1},
            ):
                running.http.post("/v1/images/generations", json=body, headers=key)
            bad = {"Authorization": "Bearer hush-hushh"}
            assert running.http.get("/v1/objectives", headers=bad).status_code == 401
            running.http.get("/" + "long" * 900)
            monkeypatch.setattr(BatchDrawer, "sample", fail)
            answer = running.http.post(
                "/v1/images/generations", json={"prompt": "sesame"}, headers=key
            )
            assert answer.status_code == 500
        ours = [r for r in caplog.records if r.name.startswith(("msdda_fast", "uvicorn"))]
        lines = [JSONLines().format(record) for record in ours]
        assert lines and not any("hush" in line or "sesame" in line for line in lines)
        assert max(len(json.loads(line).get("path", "")) for line in lines) <= 200

    def test_what_clients_send_makes_no_metrics(self, served):
        def series():
            return len(served.http.get("/metrics").text.splitlines())

        for name in ("a", "b"):
            served.http.get(f"/{name}")
            served.draw(**{name: 1})
        before = series()
        for i in range(20):
            served.http.get(f"/{i}")
            served.draw(**{str(i): 1})
            served.draw(user=f"u{i}", steps=0, model=f"m{i}")
        assert series() <= before + 2  # a code that was not seen before


class TestHalfClosed:
    def test_gets_its_answers(self, served):
        head = POST + b"Content-Length: %d\r\n\r\n" % len(BODY)
        assert statuses(raw(served, head + BODY, finish=True)) == [200]
        assert statuses(raw(served, (head + BODY) * 2, finish=True)) == [200, 200]

    def test_also_when_they_take_long(self, serve, monkeypatch):
        monkeypatch.setattr(connection, "LOOK_S", 0.02)
        running, sample = serve(), BatchDrawer.sample

        def slow(self, *arguments, **options):
            time.sleep(0.2)
            return sample(self, *arguments, **options)

        monkeypatch.setattr(BatchDrawer, "sample", slow)
        head = POST + b"Content-Length: %d\r\n\r\n" % len(BODY)
        found = statuses(raw(running, head + BODY, finish=True))
        assert found[-1] == 200 and set(found[:-1]) == {100}  # which clients skip

    def test_half_a_request_gets_none(self, served):
        head = POST + b"Content-Length: %d\r\n\r\n" % len(BODY)
        assert statuses(raw(served, head + BODY[:-1], finish=True)) == []

    def test_half_a_form_neither_and_that_is_no_failure(self, served, caplog):
        with caplog.at_level(logging.INFO, logger="msdda_fast.serve"):
            assert (
                statuses(raw(served, FORM + b"Content-Length: 4000\r\n\r\n" + PART, finish=True))
                == []
            )
            until(lambda: [r for r in caplog.records if r.getMessage() == "request"])
        assert caplog.records[-1].fields["error"] == "client_gone"
        assert "a request failed" not in caplog.text


class TestTooMany:
    @pytest.fixture
    def few(self, monkeypatch):
        monkeypatch.setattr(connection, "most_connections", lambda: 16)  # 4 of an address

    def test_those_that_wait_for_their_clients_make_room(self, serve, few):
        running = serve()
        port = httpx2.URL(running.url).port
        idle = [socket.create_connection(("127.0.0.1", port), SOON) for _ in range(12)]
        with httpx2.Client(base_url=running.url, timeout=SOON) as client:
            assert client.get("/health").status_code == 200
        assert len(running._server.server_state.connections) <= 4
        with socket.create_connection(
            ("127.0.0.1", port), SOON, source_address=("127.0.0.2", 0)
        ) as other:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in other.recv(65536)
        for one in idle:
            one.close()

    def test_those_with_requests_do_not(self, serve, few, monkeypatch):
        running, opened = serve(), threading.Event()
        sample = BatchDrawer.sample

        def gated(self, *arguments, **options):
            assert opened.wait(SOON)
            return sample(self, *arguments, **options)

        monkeypatch.setattr(BatchDrawer, "sample", gated)
        port = httpx2.URL(running.url).port
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
        asking = [socket.create_connection(("127.0.0.1", port), SOON) for _ in range(4)]
        for one in asking:
            one.sendall(head + BODY)
        until(lambda: running.engine.stats().waiting + running.engine.stats().drawing == 4)
        answer = raw(running, b"")
        assert statuses(answer) == [503] and b"too_many_connections" in answer
        opened.set()
        for one in asking:
            assert b"200 OK" in one.recv(65536)
            one.close()

    def test_never_so_many_as_descriptors(self, monkeypatch):
        for limit, most in ((256, 128), (100, 8), (10**6, 1024), (-1, 1024)):
            connection.most_connections.cache_clear()
            monkeypatch.setattr(connection.resource, "getrlimit", lambda _, n=limit: (n, n))
            assert connection.most_connections() == most
        connection.most_connections.cache_clear()


def test_who_does_not_read_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(connection, "STALLED_S", 0.2)
    monkeypatch.setattr(connection, "LOOK_S", 0.05)
    running = serve()
    port = httpx2.URL(running.url).port
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.settimeout(SOON)
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"

        def is_cut_off():
            try:
                client.sendall(asked * 100)
            except OSError:
                return True
            return False

        until(is_cut_off)
    until(lambda: not running._server.server_state.connections)

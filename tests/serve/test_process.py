# SPDX-License-Identifier: Apache-2.0
"""One serving process: tells when it is ready, ends with its engine, and stops in time."""

import asyncio
import signal
import threading
from types import SimpleNamespace

import pytest
import uvicorn

from msdda_fast.serve import process
from msdda_fast.serve.process import Process, _Server
from msdda_fast.serve.settings import ServeSettings
from tests.serve.conftest import SETTINGS, SOON


class Service:
    """What a server asks of it."""

    def __init__(self):
        self.is_ready = self.has_failed = False
        self.closed, self._event = [], threading.Event()
        self.engine = SimpleNamespace(close=self._close)

    def _close(self, **how):
        self.closed.append(how)
        self._event.set()

    def wait(self):
        assert self._event.wait(SOON)


@pytest.fixture
def server():
    told = []
    ready = SimpleNamespace(send=told.append)
    one = _Server(uvicorn.Config("", log_config=None), Service(), 8.0, ready)
    one.told = told
    return one


def tick(server):
    return asyncio.run(server.on_tick(1))


def test_ready_is_told_once(server):
    assert not tick(server) and not server.told
    server._service.is_ready = True
    assert not tick(server) and not tick(server)
    assert server.told == [None]


def test_one_whose_engine_has_failed_stops(server):
    assert not tick(server)
    server._service.has_failed = True
    assert tick(server) and server.has_failed and server.should_exit


def test_a_second_interrupt_refuses_what_is_not_drawn(server):
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit and not server._service.closed
    server.handle_exit(signal.SIGINT, None)
    server._service.wait()
    assert server._service.closed == [{"drain": False}] and not server.force_exit


def test_a_stop_drains_for_a_bounded_time(server):
    server.servers, server.lifespan = [], SimpleNamespace(shutdown=lambda: asyncio.sleep(0))
    asyncio.run(server.shutdown())
    assert server._service.closed == [{"timeout_s": 8.0}]


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_on_loopback_other_hosts_are_refused_and_failures_end_with_code_1(host, local, monkeypatch):
    seen = {}

    class Engine:
        def __init__(self, pipe):
            pass

        def close(self, **how):
            seen["closed"] = how

    class Failed(_Server):
        def run(self, sockets):
            seen["limit"], self.has_failed = self.config.timeout_graceful_shutdown, True

    def create_app(engine, settings):
        seen["is_local"] = settings.is_local
        return SimpleNamespace(state=SimpleNamespace(service=Service()))

    monkeypatch.setattr(process, "Engine", Engine)
    monkeypatch.setattr(process, "create_app", create_app)
    monkeypatch.setattr(process, "_Server", Failed)
    monkeypatch.setattr(process, "log_to_stderr", lambda: None)
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    served = Process(load=lambda: None, settings=ServeSettings(**SETTINGS), host=host)
    with pytest.raises(SystemExit) as ended:
        served.run()
    assert ended.value.code == 1
    assert seen == {"is_local": local, "limit": 10, "closed": {"drain": False, "timeout_s": 2}}

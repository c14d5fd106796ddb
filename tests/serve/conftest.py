# SPDX-License-Identifier: Apache-2.0
import threading
import time

import httpx2
import pytest
import uvicorn

import msdda_fast as mf
from msdda_fast.serve.app import create_app
from msdda_fast.serve.connection import Connection
from msdda_fast.serve.settings import ServeSettings
from tests.serve.browsing import browser, visit  # noqa: F401 - fixtures
from tests.serve.pictures import PNG
from tests.tiny_model import one_thread, pipe, quiet, tiny  # noqa: F401 - fixtures

SOON = 30  # seconds; every wait is bounded
SETTINGS = dict(model="tiny", steps=3, max_steps=50, max_images=3, max_prompt_chars=200)


class Running:
    """An app on a free port, in a thread."""

    def __init__(self, engine, **settings):
        self.engine = engine
        app = create_app(engine, ServeSettings(**{**SETTINGS, **settings}))
        self.service = app.state.service
        config = uvicorn.Config(app, port=0, log_config=None, http=Connection, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx2.Client(base_url=self.url, timeout=SOON)

    def draw(self, **body):
        return self.http.post("/v1/images/generations", json={"prompt": "a red dog", **body})

    def stop(self):
        self.http.close()
        self._server.should_exit = True
        self.engine.close(drain=False, timeout_s=SOON)
        self._thread.join(SOON)
        assert not self._thread.is_alive()


def until(condition, seconds=SOON):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


@pytest.fixture(scope="session")
def own_pipe(tiny):  # noqa: F811
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


@pytest.fixture
def serve(own_pipe):
    """Run services of the test's own, which stop after it."""
    running = []

    def start(*, warm=True, settings=None, **options):
        options = {"max_batch": 2, "max_wait_ms": 0, **options}
        limits = {"max_images": 1 if "queue_limit" in options else 8, **(settings or {})}
        running.append(Running(mf.Engine(own_pipe, **options), **limits))
        if warm:
            until(lambda: running[-1].service.is_ready)
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.fixture(scope="module")
def served(own_pipe):
    """One service for the tests that only ask it."""
    one = Running(mf.Engine(own_pipe, max_batch=2, max_wait_ms=0))
    until(lambda: one.service.is_ready)
    yield one
    one.stop()


@pytest.fixture
def edit(served):
    """Post a form whose files are the arguments with bytes."""

    def post(image=PNG, **fields):
        parts = []
        for name, value in {"image": image, "prompt": "a red dog", **fields}.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    parts.append((name, (name if isinstance(one, bytes) else None, one)))
        return served.http.post("/v1/images/edits", files=parts)

    return post


@pytest.fixture
def asked(served, monkeypatch):
    """The requests that reach the engine."""
    found, submit = [], served.engine.submit_images

    def note(request, count=1, **options):
        found.append(request)
        return submit(request, count, **options)

    monkeypatch.setattr(served.engine, "submit_images", note)
    return found

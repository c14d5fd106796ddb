# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a service is answered, in a bounded time, and leaves nothing behind."""

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

import msdda_fast as mf
from msdda_fast.batching import worker
from msdda_fast.batching.drawing import BatchDrawer
from tests.serve.conftest import SOON, until


@pytest.fixture
def gate(monkeypatch):
    """Batches wait here while it is closed."""
    opened = threading.Event()
    opened.set()
    sample = BatchDrawer.sample

    def gated(self, *arguments, **options):
        assert opened.wait(SOON)
        return sample(self, *arguments, **options)

    monkeypatch.setattr(BatchDrawer, "sample", gated)
    yield opened
    opened.set()


def test_nothing_is_served_before_it_is_warm(serve, gate):
    gate.clear()
    running = serve(warm=False)
    assert running.http.get("/health").status_code == 200
    for answer in (running.http.get("/ready"), running.draw()):
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "not_ready"
    gate.set()
    until(lambda: running.http.get("/ready").status_code == 200)
    assert running.draw().status_code == 200


def test_what_cannot_be_warmed_is_unhealthy(serve, monkeypatch):
    def fail(self, *arguments, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(BatchDrawer, "sample", fail)
    running = serve(warm=False)
    until(lambda: running.http.get("/health").status_code == 503)
    assert running.http.get("/ready").status_code == 503
    assert "no room" not in running.http.get("/health").text


def test_overload_is_refused_with_a_time_to_come_back_and_nothing_is_lost(serve, gate):
    running = serve(queue_limit=4, max_batch=1)
    gate.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(running.draw, seed=seed) for seed in range(8)]
        until(lambda: running.engine.stats().refused == 5)
        gate.set()
        answers = [answer.result(SOON) for answer in answers]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == 5 and sum(answer.status_code == 200 for answer in answers) == 3
    for answer in refused:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert running.draw().status_code == 200


def test_a_greedy_client_does_not_keep_others_out(serve):
    running = serve(queue_limit=8, max_batch=2)
    stopped, greedy = threading.Event(), []

    def ask_for_ever():
        while not stopped.is_set():
            greedy.append(running.draw(steps=1).status_code)
            time.sleep(0.02)  # or its threads keep the service itself from running

    threads = [threading.Thread(target=ask_for_ever) for _ in range(12)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: greedy.count(429) > 5)
        other = httpx2.HTTPTransport(local_address="127.0.0.2")
        with httpx2.Client(base_url=running.url, transport=other, timeout=SOON) as client:
            body = {"prompt": "a dog", "steps": 1}
            answers = [client.post("/v1/images/generations", json=body) for _ in range(10)]
    finally:
        stopped.set()
        for thread in threads:
            thread.join(SOON)
    assert [answer.status_code for answer in answers] == [200] * 10


def test_a_request_may_not_have_more_images_than_may_wait(serve):
    with pytest.raises(ValueError, match="max_images=3, but one client only client_limit=1"):
        serve(queue_limit=2, settings={"max_images": 3})


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_client_that_hangs_up_leaves_the_line(serve, gate, stream, caplog):
    running = serve()
    gate.clear()
    body = {"prompt": "a dog", "n": 3, "stream": stream}
    plug = threading.Thread(target=running.draw)
    plug.start()
    until(lambda: running.engine.stats().drawing == 1)
    with ThreadPoolExecutor(1) as pool:
        client = httpx2.Client(base_url=running.url)
        asked = pool.submit(client.post, "/v1/images/generations", json=body)
        until(lambda: running.engine.stats().waiting == 3)
        for connection in client._transport._pool.connections:
            connection._connection._network_stream.get_extra_info("socket").shutdown(2)
        assert asked.exception(SOON)
        client.close()
    until(lambda: running.engine.stats().cancelled == 3)
    assert running.engine.stats().waiting == 0
    gate.set()
    plug.join(SOON)
    assert running.engine.stats().completed == 1
    gc.collect()
    assert "never retrieved" not in caplog.text  # asyncio says it where nobody looks at an error


def test_time_is_up(serve, gate):
    running = serve(settings={"timeout_s": 0.2})
    gate.clear()
    plug = running.engine.submit(mf.ImageRequest("a dog", num_inference_steps=1))
    until(lambda: running.engine.stats().drawing == 1)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(running.draw)
        until(lambda: running.engine.stats().waiting == 1)
        time.sleep(0.25)
        gate.set()
        answer = late.result(SOON)
    assert plug.result(SOON)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"


def test_a_failed_batch_is_answered_and_the_next_one_drawn(serve, monkeypatch):
    running = serve()
    # two requests, each tried twice
    sample, failures = BatchDrawer.sample, [OSError("/secret/path") for _ in range(4)]

    def fail(self, batch, **options):
        if failures and batch[0].prompt:  # the engine's own probe has none
            raise failures.pop()
        return sample(self, batch, **options)

    monkeypatch.setattr(BatchDrawer, "sample", fail)
    plain = running.draw()
    assert plain.status_code == 500 and "secret" not in plain.text
    streamed = running.draw(stream=True)
    assert streamed.status_code == 200 and "secret" not in streamed.text
    assert "event: error" in streamed.text and "[DONE]" not in streamed.text
    assert json.loads(streamed.text.split("data: ")[1])["error"]["code"] == "failed"
    assert running.draw().status_code == 200


def test_an_engine_that_restarts_is_healthy_but_not_ready(serve, monkeypatch):
    running, sample, broken = serve(), BatchDrawer.sample, threading.Event()
    monkeypatch.setattr(worker, "BACK_OFF_S", (0.2,) * 100)

    def fail(self, *arguments, **options):
        if broken.is_set():
            raise OSError("the device is lost")
        return sample(self, *arguments, **options)

    monkeypatch.setattr(BatchDrawer, "sample", fail)
    broken.set()
    assert running.draw().status_code == 500
    until(lambda: running.http.get("/health").json() == {"status": "restarting"})
    assert running.http.get("/ready").status_code == 503
    broken.clear()
    until(lambda: running.http.get("/ready").status_code == 200)
    assert running.http.get("/health").json() == {"status": "ok"}
    assert running.draw().status_code == 200


def test_a_dead_engine_is_unhealthy_and_refuses(serve, monkeypatch):
    def die(self, *arguments, **options):
        raise SystemExit

    running = serve()
    monkeypatch.setattr(worker, "BACK_OFF_S", (0.0,))
    monkeypatch.setattr(BatchDrawer, "sample", die)
    assert running.draw().status_code == 500
    until(lambda: running.engine.has_failed)
    assert running.draw().status_code == 503
    assert running.http.get("/health").status_code == 503


def test_a_closing_engine_refuses_what_comes_and_answers_what_was_there(serve, gate):
    running = serve()
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.draw)
        until(lambda: running.engine.stats().drawing == 1)
        closing = threading.Thread(target=running.engine.close)
        closing.start()
        until(lambda: running.engine.stats().is_closed)
        answer = running.draw()
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "unavailable"
        assert running.http.get("/ready").status_code == 503
        gate.set()
        assert asked.result(SOON).status_code == 200
    closing.join(SOON)

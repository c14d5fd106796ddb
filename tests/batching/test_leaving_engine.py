# SPDX-License-Identifier: Apache-2.0
"""Engines end in a bounded time: closed while they draw, dropped without a word, or forked."""

import gc
import multiprocessing
import threading
import time
import weakref

import pytest
from PIL import Image

import msdda_fast as mf
from msdda_fast.batching.drawing import BatchDrawer
from tests.batching.conftest import SOON, request


@pytest.fixture
def stuck(monkeypatch):
    """Batches stay in one long step until this is set."""
    over, reached = threading.Event(), threading.Event()
    sample = BatchDrawer.sample

    def hold(self, *arguments, **options):
        reached.set()
        assert over.wait(SOON)
        return sample(self, *arguments, **options)

    monkeypatch.setattr(BatchDrawer, "sample", hold)
    over.reached = reached
    yield over
    over.set()


@pytest.mark.parametrize("drain", [True, False])
def test_closing_does_not_wait_for_a_long_step(start, stuck, drain):
    engine = start(max_batch=1)
    drawn, waiting = engine.submit(request()), engine.submit(request())
    assert stuck.reached.wait(SOON)
    engine.close(drain=drain, timeout_s=0.05)
    assert engine._worker.is_alive()  # in its step
    for future in (drawn, waiting):
        assert isinstance(future.exception(0), mf.EngineClosed)
    stuck.set()
    engine._worker.join(SOON)
    assert not engine._worker.is_alive() and engine.stats().failed == 2


@pytest.mark.parametrize("seconds", [float("inf"), 1e300])
def test_closing_may_take_any_time(start, seconds):
    engine = start()
    future = engine.submit(request())
    engine.close(timeout_s=seconds)
    assert future.result(0)


@pytest.mark.parametrize("seconds", [-1, float("nan"), "5"])
def test_closing_takes_no_negative_time(start, seconds):
    with pytest.raises(ValueError, match="timeout_s must be at least 0"):
        start().close(timeout_s=seconds)


def test_a_dropped_engine_draws_what_was_admitted_and_ends(own_pipe):
    engine = mf.Engine(own_pipe, max_batch=4, output_type="latent", max_wait_ms=1e6)
    future, worker = engine.submit(request()), engine._worker
    del engine
    gc.collect()
    assert future.result(SOON)
    worker.join(SOON)
    assert not worker.is_alive()


def in_the_child(engine, answers):
    for ask in (lambda: engine.submit(request()), engine.prepare):
        try:
            ask()
        except mf.EngineClosed as error:
            answers.put(str(error))
    engine.close()
    answers.put("closed")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_refuses_what_nobody_would_draw(start):
    engine = start()
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    with engine._queue._changed:  # as another thread may hold it at the moment of the fork
        child = fork.Process(target=in_the_child, args=(engine, answers), daemon=True)
        child.start()
    child.join(SOON)
    assert child.exitcode == 0
    assert all("is a fork" in answers.get() for _ in range(2)) and answers.get() == "closed"
    assert engine.submit(request()).result(SOON)


@pytest.mark.parametrize("more", [{}, {"image": Image.new("RGB", (32, 32)), "image_strength": 0.7}])
def test_images_are_gone_with_the_last_who_holds_them(start, more):
    """Not only when Python looks for cycles, which it does the less the more there is."""
    engine = start(output_type="pil")
    gc.collect()
    gc.disable()
    try:
        future = engine.submit(request(**more))
        held = [weakref.ref(future), weakref.ref(future.result(SOON).image)]
        del future
        end = time.monotonic() + SOON
        while any(one() is not None for one in held):
            assert time.monotonic() < end, held
            time.sleep(0.01)
    finally:
        gc.enable()

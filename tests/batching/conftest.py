# SPDX-License-Identifier: Apache-2.0
"""Engines over the tiny model, and requests that are together in one batch."""

import threading

import pytest

import msdda_fast as mf
from msdda_fast.batching.limits import Limits
from tests.tiny_model import calls, one_thread, pipe, quiet, tiny, tiny_kl  # noqa: F401 - fixtures

SOON = 30  # seconds; every wait is bounded


def limits(**changed):
    """Of a short queue."""
    given = dict(max_batch=3, max_wait_ms=2e3, queue_limit=6, client_limit=3, batch_sizes=None)
    return Limits.check(**{**given, "max_pixels": 2**22, "max_cost": 2**30, **changed})


def request(prompt="a red dog", **fields):
    return mf.ImageRequest(prompt, **{"num_inference_steps": 3, "seed": 0, **fields})


@pytest.fixture(scope="module")
def own_pipe(tiny):  # noqa: F811 - a fixture
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


@pytest.fixture
def start(own_pipe):
    """Make engines, which are closed after the test, in a bounded time."""
    made = []

    def make(pipe=own_pipe, **options):  # noqa: F811 - a fixture
        options = {"max_batch": 4, "output_type": "latent", "max_wait_ms": 0, **options}
        made.append(mf.Engine(pipe, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close(drain=False, timeout_s=SOON)
        assert not engine._worker.is_alive()


class Plug:
    """A request that holds an engine's thread in its first step until it is pulled."""

    def __init__(self, engine, **fields):
        self.reached, self.pulled = threading.Event(), threading.Event()
        self.future = engine.submit(request(num_inference_steps=2, on_step=self._hold, **fields))
        assert self.reached.wait(SOON)

    def _hold(self, progress):
        self.reached.set()
        assert self.pulled.wait(SOON)

    def pull(self):
        self.pulled.set()


def together(engine, requests, **plug):
    """Results of requests that are all in the queue when the next batch is made."""
    plug = Plug(engine, **plug)
    futures = [engine.submit(one) for one in requests]
    plug.pull()
    return [future.result(SOON) for future in futures]


def assert_close(actual, expected):
    # float32, sums in another order, through three steps of guidance of a random network
    assert (actual - expected).norm() < 2e-4 * expected.norm()

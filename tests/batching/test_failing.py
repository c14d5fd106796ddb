# SPDX-License-Identifier: Apache-2.0
"""What fails fails alone; an engine recovers by itself, or says that it cannot."""

import asyncio

import pytest

import msdda_fast as mf
from msdda_fast.batching import worker
from msdda_fast.batching.drawing import BatchDrawer
from tests.batching.conftest import SOON, Plug, assert_close, request

POISON = "a red cat"
PAUSES = worker.BACK_OFF_S


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(worker, "BACK_OFF_S", (0.0, 0.0, 0.0))


@pytest.fixture
def fail(monkeypatch):
    """Call with a function of the prompts of a batch, which returns what it fails with or None."""
    sample = BatchDrawer.sample

    def install(reason):
        drawn = []

        def failing(self, batch, **options):
            drawn.append([ticket.prompt for ticket in batch])
            if (error := reason(drawn[-1])) is not None:
                raise error
            return sample(self, batch, **options)

        monkeypatch.setattr(BatchDrawer, "sample", failing)
        return drawn

    return install


def poisoned(error):
    return lambda prompts: error if POISON in prompts else None


class TestOneRequest:
    @pytest.mark.parametrize(
        "error", [ValueError("bad"), MemoryError("no room"), SystemExit(3), KeyboardInterrupt()]
    )
    def test_fails_alone_and_after_its_second_time(self, start, fail, error):
        engine = start()
        plug = Plug(engine)
        drawn = fail(poisoned(error))
        good = [engine.submit(request(seed=seed)) for seed in (0, 1)]
        bad = engine.submit(request(POISON))
        plug.pull()
        assert_close(good[0].result(SOON).image, engine.submit(request()).result(SOON).image)
        assert good[1].result(SOON)
        with pytest.raises(mf.EngineFailed, match=type(error).__name__) as raised:
            bad.result(SOON)
        assert raised.value.__cause__ is error
        # together, then each alone, once; then the probe, which finds nothing wrong
        alone = [["a red dog"], ["a red dog"], [POISON], [""]]
        assert drawn[:5] == [["a red dog", "a red dog", POISON], *alone]
        assert sum(POISON in prompts for prompts in drawn) == 2

    def test_never_stops_the_engine_however_often_it_comes(self, start, fail, monkeypatch):
        engine = start()
        monkeypatch.setattr(BatchDrawer, "restart", pytest.fail)
        fail(poisoned(MemoryError("as large as that")))
        for _ in range(5):
            assert isinstance(engine.submit(request(POISON)).exception(SOON), mf.EngineFailed)
        assert engine.submit(request()).result(SOON)
        stats = engine.stats()
        assert (stats.failed, stats.failure, stats.restarting) == (5, None, None)
        assert not engine.has_failed

    def test_whose_latent_is_not_finite_gets_no_picture(self, start, monkeypatch):
        sample = BatchDrawer.sample

        def spoiled(self, batch, **options):
            x_0 = sample(self, batch, **options)
            for row, ticket in enumerate(batch):
                if ticket.prompt == POISON:
                    x_0[row, 0, 0, 0] = float("nan") if ticket.seed else float("inf")
            return x_0

        monkeypatch.setattr(BatchDrawer, "sample", spoiled)
        engine = start()
        plug = Plug(engine)
        futures = [engine.submit(request(p, seed=s)) for p in (POISON, "a cat") for s in (0, 1)]
        plug.pull()
        for future in futures[:2]:
            with pytest.raises(mf.EngineFailed, match="NaN or infinite"):
                future.result(SOON)
        for seed, future in enumerate(futures[2:]):
            expected = engine.submit(request("a cat", seed=seed)).result(SOON)
            assert future.result(SOON).seed == seed
            assert_close(future.result(SOON).image, expected.image)

    @pytest.mark.parametrize(
        "error",
        [asyncio.CancelledError(), SystemExit(3), KeyboardInterrupt(), StopIteration()],
        ids=repr,
    )
    def test_may_raise_anything_from_its_callback(self, start, error):
        def fall(progress):
            raise error

        engine = start()
        with pytest.raises(mf.EngineFailed, match="on_step raised") as raised:
            asyncio.run(wrapped(engine.submit(request(on_step=fall))))
        assert raised.value.__cause__ is error
        assert engine.submit(request()).result(SOON)

    def test_may_raise_anything_when_it_is_done(self, start, caplog):
        def fall(future):
            raise SystemExit(3)

        engine = start()
        plug = Plug(engine)
        future = engine.submit(request())
        future.add_done_callback(fall)
        plug.pull()
        assert future.result(SOON)
        assert engine.submit(request()).result(SOON)
        assert "a callback of a future raised" in caplog.text


async def wrapped(future):
    return await asyncio.wait_for(asyncio.wrap_future(future), SOON)


class Sick:
    """An engine that can draw nothing for its next `draws` attempts."""

    def __init__(self, draws):
        self.draws = draws

    def __call__(self, prompts):
        self.draws -= 1
        return OSError("the device is lost") if self.draws >= 0 else None


class TestTheEngine:
    @pytest.mark.parametrize("draws", [3, 4, 5])
    def test_draws_again_after_restarts(self, start, fail, monkeypatch, draws):
        restarts = []
        restart = BatchDrawer.restart
        monkeypatch.setattr(BatchDrawer, "restart", lambda s: (restarts.append(1), restart(s))[1])
        engine = start(max_batch=1)
        restarts.clear()
        plug = Plug(engine)
        fail(Sick(draws))  # the first request twice, then the probe before and after restarts
        first, *others = [engine.submit(request()) for _ in range(4)]
        plug.pull()
        assert isinstance(first.exception(SOON), mf.EngineFailed)
        assert all(future.result(SOON) for future in others)  # they waited
        assert len(restarts) == draws - 2
        assert engine.stats().failure is engine.stats().restarting is None

    def test_says_that_it_restarts_and_lets_requests_expire(self, start, fail, monkeypatch):
        monkeypatch.setattr(worker, "BACK_OFF_S", (SOON,))
        engine = start(max_batch=1)
        fail(Sick(3))
        assert isinstance(engine.submit(request()).exception(SOON), mf.EngineFailed)
        late = engine.submit(request(timeout_s=0.01))
        assert isinstance(late.exception(SOON), mf.RequestTimeout)
        assert engine.stats().restarting == "OSError: the device is lost"
        assert not engine.has_failed
        waiting = engine.submit(request())
        engine.close(drain=False, timeout_s=SOON)
        assert isinstance(waiting.exception(0), mf.EngineClosed)
        assert not engine._worker.is_alive()

    def test_fails_for_good_after_the_last_restart_and_leaves_nobody_waiting(self, start, fail):
        engine = start(max_batch=2)
        plug = Plug(engine)
        fail(Sick(10**9))
        futures = [engine.submit(request()) for _ in range(5)]
        plug.pull()
        for future in futures:
            assert isinstance(future.exception(SOON), mf.EngineFailed)
        engine._worker.join(SOON)
        assert engine.has_failed and engine.stats().failure == "OSError: the device is lost"
        with pytest.raises(mf.EngineClosed):
            engine.submit(request())

    def test_waits_longer_from_restart_to_restart(self):
        assert list(PAUSES) == sorted(set(PAUSES)) and 30 < sum(PAUSES) < 120

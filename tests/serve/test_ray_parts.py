# SPDX-License-Identifier: Apache-2.0
"""Requests, replicas and settings of the Ray application, each by itself and without a cluster."""

import asyncio
from importlib.resources import files
from types import SimpleNamespace

import pytest
import yaml
from ray.exceptions import ActorDiedError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

import msdda_fast as mf
from msdda_fast.batching.request import GeneratedImage, ImageRequest, Progress
from msdda_fast.errors import EngineClosed, EngineFailed, InvalidWeights, QueueFull, RequestTimeout
from msdda_fast.serve import ray_order
from msdda_fast.serve.ray import ObjectiveArgs, RayArgs, app, build
from msdda_fast.serve.ray_drawer import Admitted, Drawer, Outcome
from msdda_fast.serve.ray_order import Order
from msdda_fast.serve.settings import ServeSettings


def image(seed):
    return GeneratedImage(
        image=None, seed=seed, is_flagged=False, batch_size=1, waited_s=0, drawn_s=0
    )


class Replicas:
    """A handle whose calls say what they are told, one list of news after the other."""

    def __init__(self, *calls):
        self._calls = list(calls)
        self.seeds = []
        self.draw = SimpleNamespace(remote=self._draw)

    def options(self, **options):
        return self

    def _draw(self, request, count, watched, client):
        self.seeds.append(request.seed)
        return Stream(self._calls.pop(0))


class Stream:
    def __init__(self, news):
        self._news = iter(news)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        item = next(self._news, None)
        if item is None:
            raise StopAsyncIteration
        if item == "silence":
            await asyncio.sleep(60)
        if isinstance(item, ActorDiedError | BackPressureError | ZeroDivisionError):
            raise item
        return item

    def cancel(self):
        pass


def order(replicas, count=1, **request):
    """The results of an order, or what it was refused with."""

    async def run():
        placed = Order(replicas, ImageRequest("a", **request), count, "me")
        await placed.admitted()
        wrapped = [asyncio.wrap_future(future) for future in placed.futures]
        return await asyncio.gather(*wrapped, return_exceptions=True)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(ray_order, "PAUSES_S", (0.0, 0.0))


DEAD = [Admitted(), ActorDiedError()]


@pytest.mark.parametrize("lost", [DEAD, [EngineClosed("x")], [Outcome(0, EngineFailed("x"))]])
def test_a_lost_request_is_sent_again_with_its_seed(lost):
    replicas = Replicas(lost, [Admitted(), Outcome(0, image(1))])
    assert order(replicas) == [image(1)]
    assert len(replicas.seeds) == 2 and len(set(replicas.seeds)) == 1


def test_what_was_told_is_not_told_again():
    first = [Admitted(), Progress(0, 1, 2), Progress(0, 2, 2), Outcome(0, image(5))]
    again = [*first[:-1], Outcome(0, image(5)), Progress(1, 1, 2), Outcome(1, image(6))]
    told = []
    results = order(Replicas([*first, ActorDiedError()], again), 2, seed=5, on_step=told.append)
    assert [result.seed for result in results] == [5, 6]
    assert [(p.image, p.step) for p in told] == [(0, 1), (0, 2), (1, 1)]


def test_a_request_that_no_replica_survives_ends():
    replicas = Replicas(DEAD, DEAD, DEAD)
    (error,) = order(replicas)
    assert isinstance(error, EngineFailed) and len(replicas.seeds) == 3


@pytest.mark.parametrize(
    ("news", "error"),
    [
        ([InvalidWeights("sum")], InvalidWeights),
        ([BackPressureError(1, 1)], QueueFull),
        (["silence"], RequestTimeout),
        ([ZeroDivisionError()], EngineFailed),
    ],
    ids=["invalid", "full", "silent", "bug"],
)
def test_what_is_never_admitted_is_refused_once(news, error):
    replicas = Replicas(news)
    with pytest.raises(error):
        order(replicas, timeout_s=0.2)
    assert len(replicas.seeds) == 1


def test_a_replica_whose_engine_has_stopped_is_unhealthy(own_pipe, monkeypatch):
    from msdda_fast.batching import worker
    from msdda_fast.batching.drawing import BatchDrawer

    drawer = Drawer(lambda: own_pipe, ServeSettings(model="tiny", max_steps=25), {"max_batch": 1})
    drawer.check_health()

    def die(self, *arguments, **options):
        raise SystemExit

    monkeypatch.setattr(worker, "BACK_OFF_S", (0.0,))
    monkeypatch.setattr(BatchDrawer, "sample", die)

    async def draw():
        return [news async for news in drawer.draw(mf.ImageRequest("a dog"), 1, False, "me")]

    assert isinstance(asyncio.run(draw())[-1].result, EngineFailed)
    drawer._engine._worker.join(30)
    with pytest.raises(EngineFailed, match="stopped"):
        drawer.check_health()


def test_the_example_is_what_ray_and_the_builder_read():
    text = files("msdda_fast.serve").joinpath("ray.yaml").read_text("utf-8")
    (described,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert described.import_path == "msdda_fast.serve.ray:build"
    args = RayArgs.model_validate(described.args)
    assert args.num_gpus == 0 and args.max_replicas == 4
    assert isinstance(build(args), Application) and isinstance(app, Application)


def test_objectives_may_have_the_noise_of_flow_models():
    args = ObjectiveArgs(source="x", noise={"kind": "FlowSDE", "level": 0.7})
    assert args.objective() == mf.Objective("x", noise=mf.FlowSDE(0.7))
    with pytest.raises(mf.errors.InvalidSchedule, match="none of"):
        ObjectiveArgs(noise={"level": 0.7}).objective()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batches": 3}, "max_batches"),
        ({"dtype": "int8"}, "dtype"),
        ({"steps": 99}, "more than max_steps"),
        ({"sizes": ["big"]}, "WIDTHxHEIGHT"),
        ({"objectives": {"a": {"path": "x"}}}, "path"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(RayArgs(**wrong))

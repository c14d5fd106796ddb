# SPDX-License-Identifier: Apache-2.0
"""What callbacks may ask of an engine that waits for them, and pipelines called beside it."""

import threading

import pytest
import torch

import msdda_fast as mf
from tests.batching.conftest import SOON, Plug, request
from tests.tiny_model import quiet

SHORT = dict(num_inference_steps=3, guidance_scale=3.0, output_type="latent")


@pytest.mark.parametrize("ask", ["result", "exception"])
def test_on_step_cannot_wait_for_an_image_of_its_engine(start, ask):
    engine = start()
    future = engine.submit(request(on_step=lambda _: getattr(engine.submit(request()), ask)()))
    with pytest.raises(mf.InvalidRequest, match="a callback cannot wait for this image"):
        future.result(SOON)
    engine.close(timeout_s=SOON)
    assert engine.stats().completed == 1  # the image that nobody waited for


def test_when_an_image_is_done_its_callback_cannot_wait_for_the_next(start):
    engine, outcomes = start(), []
    plug = Plug(engine)

    def wait(done):
        try:
            engine.submit(request()).result()
        except mf.InvalidRequest as error:
            outcomes.append(error)
        outcomes.append(done.result())  # done: nobody waits

    plug.future.add_done_callback(wait)
    plug.pull()
    engine.submit(request()).result(SOON)
    assert len(outcomes) == 2 and outcomes[1] is plug.future.result(SOON)


def test_a_call_of_the_pipeline_cannot_wait_for_the_engine(start, own_pipe):
    """The engine waits for the end of the call, which waits for its callback."""
    engine, outcomes = start(), []

    def ask(pipe, k, t, tensors):
        for wait in (lambda: engine.submit(request()).result(), engine.prepare, engine.close):
            try:
                outcomes.append(wait())
            except (mf.InvalidRequest, mf.EngineClosed) as error:
                outcomes.append(type(error))

    pipe = quiet(mf.MSDDAPipeline.from_pipe(own_pipe))
    pipe("a red dog", seed=0, callback_on_step_end=ask, **{**SHORT, "num_inference_steps": 1})
    assert outcomes == [mf.InvalidRequest, mf.InvalidRequest, None]
    engine.close(timeout_s=SOON)
    assert engine.stats().completed == 1


def test_an_engine_and_calls_of_its_pipeline_in_other_threads(start, own_pipe):
    """Not one bit of either changes."""
    engine = start(batch_sizes=[4])
    pipes = own_pipe, quiet(mf.MSDDAPipeline.from_pipe(own_pipe))

    def call(pipe, seed):
        return pipe("a blue cat", weights=[0.3, 0.7], seed=seed, **SHORT).images

    called = [call(own_pipe, seed) for seed in range(2)]
    drawn = [engine.submit(request(seed=seed)).result(SOON).image for seed in range(2)]
    wrong, ready = [], threading.Barrier(4)

    def work(make, seed, expected):
        ready.wait(SOON)
        for _ in range(3):
            if not torch.equal(make(seed), expected):
                wrong.append((make, seed))

    def submit(seed):
        return engine.submit(request(seed=seed)).result(SOON).image

    threads = [
        threading.Thread(target=work, args=task, daemon=True)
        for seed in range(2)
        for task in (
            (lambda seed: call(pipes[seed], seed), seed, called[seed]),
            (submit, seed, drawn[seed]),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert not wrong

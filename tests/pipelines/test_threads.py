# SPDX-License-Identifier: Apache-2.0
"""Threads that call pipelines of the same networks wait for each other."""

import copy
import multiprocessing
import pickle
import threading

import pytest
import torch

import msdda_fast as mf
from msdda_fast.errors import PipelineBusy
from msdda_fast.pipelines.exclusive import exclusively
from tests.tiny_model import quiet

SOON = 30  # seconds; every wait is bounded
SHORT = dict(num_inference_steps=3, guidance_scale=3.0, output_type="latent")


@pytest.fixture
def pipe(tiny) -> mf.MSDDAPipeline:
    return quiet(mf.MSDDAPipeline.from_pipe(tiny.shared()))


def draw(pipe, i, **options):
    weights = {"warm": 0.2 * i, "cool": 1 - 0.2 * i}
    prompt = ("a red dog", "a blue cat")[i % 2]
    return pipe(prompt, weights=weights, seed=i, **SHORT, **options).images


@pytest.mark.parametrize(("forward", "own"), [("auto", False), ("sequential", True)])
def test_images_are_those_of_one_thread(pipe, forward, own):
    """Of one pipeline, or of a pipeline each over the same networks."""
    pipe.set_forward(forward)
    alone = [draw(pipe, i) for i in range(2)]
    pipes = [quiet(mf.MSDDAPipeline.from_pipe(pipe)) if own else pipe for _ in range(2)]
    found, ready = {}, threading.Barrier(2)

    def work(i):
        ready.wait()
        for _ in range(3):
            found[i] = draw(pipes[i], i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert torch.equal(found[i], alone[i])


def test_a_thread_waits_for_the_end_of_a_call(pipe):
    order, begun = [], threading.Event()

    def look(pipe, k, t, tensors):
        if k == 0:
            begun.set()
            other.join(0.2)  # does not end before this call does
        order.append("first")

    other = threading.Thread(target=lambda: (begun.wait(), draw(pipe, 0), order.append("second")))
    other.start()
    draw(pipe, 1, callback_on_step_end=look)
    other.join()
    assert order == ["first"] * 3 + ["second"]


def test_a_callback_may_call_another_pipeline_but_not_its_own(pipe):
    pipe.set_forward("sequential")  # which switches adapters
    alone = draw(pipe, 0), draw(pipe, 1)
    other = quiet(mf.MSDDAPipeline.from_pipe(pipe))
    inside = []

    def call(called):
        return lambda *_: inside.append(draw(called, 1)) or {}

    assert torch.equal(draw(pipe, 0, callback_on_step_end=call(other)), alone[0])
    assert len(inside) == 3 and all(torch.equal(x, alone[1]) for x in inside)
    for nested in (call(pipe), lambda *_: pipe.prepare()):
        with pytest.raises(PipelineBusy, match="from_pipe"):
            draw(pipe, 0, callback_on_step_end=nested)
        assert torch.equal(draw(pipe, 0), alone[0])  # it is free again


def test_callbacks_that_call_each_others_pipeline_do_not_wait_for_ever(pipe):
    """One of the two is refused, and the other one ends."""
    pipes = pipe, quiet(copy.deepcopy(pipe))
    alone = draw(pipe, 0)
    both, outcomes = threading.Barrier(2), []

    def work(own, other):
        def look(called, k, t, tensors):
            if k == 0:
                both.wait(SOON)
                draw(other, 1)

        try:
            outcomes.append(draw(own, 0, callback_on_step_end=look))
        except PipelineBusy as error:
            outcomes.append(error)

    threads = [
        threading.Thread(target=work, args=pair, daemon=True) for pair in (pipes, pipes[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    drawn = [outcome for outcome in outcomes if not isinstance(outcome, PipelineBusy)]
    assert len(outcomes) == 2 and len(drawn) == 1 and torch.equal(drawn[0], alone)
    assert torch.equal(draw(pipe, 0), alone)  # both are free again


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_waits_for_no_thread_of_its_parent(pipe):
    """Such a thread is not there to end its call."""
    fork = multiprocessing.get_context("fork")
    inside, over = threading.Event(), threading.Event()

    def hold():
        with exclusively(pipe.shared_networks()):
            inside.set()
            over.wait(SOON)

    def use():
        with exclusively(pipe.shared_networks()):
            pass

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(SOON)
    child = fork.Process(target=use, daemon=True)
    child.start()
    child.join(SOON)
    code = child.exitcode
    child.kill()
    over.set()
    thread.join()
    assert code == 0


def test_pipelines_stay_copyable(pipe):
    expected = draw(pipe, 1)
    inside = []
    draw(pipe, 0, callback_on_step_end=lambda called, *_: inside.append(copy.deepcopy(called)))
    for copied in (copy.deepcopy(pipe), inside[0]):
        assert torch.equal(draw(copied, 1), expected)
    fresh = quiet(mf.MSDDAPipeline.from_pipe(pipe))
    assert torch.equal(draw(pickle.loads(pickle.dumps(fresh)), 1), expected)

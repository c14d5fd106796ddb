# SPDX-License-Identifier: Apache-2.0
"""A rank that dies, hangs, fails or strays ends the others with a named error, and soon."""

import os

import pytest
import torch

from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.errors import RankLost, RanksDiffer
from tests.parallel.ranks import run_ranks, values

SOON = 20.0  # seconds; a closed socket takes milliseconds, the rest is a busy machine
CULPRIT = 1


def sample(parallel, trouble=None, steps=4, planned=4):
    """A generation of a model that returns its input; `trouble(x, k)` after step 1 of CULPRIT."""
    x = torch.ones(1, 4, 2, 2)
    with parallel.generation({}):
        parallel.begin([parallel.exchange([True, True], 1, x.shape, x.dtype, x.device)] * planned)
        for k in range(steps):
            (output, _) = parallel.evaluate(lambda work, x=x: [x[None]] * len(work.objectives), x)
            x = x + output[0]
            if k == 1 and trouble is not None and parallel.rank == CULPRIT:
                x = trouble(x)
        parallel.finish(x)
    return x


def die(x):
    os._exit(3)


def fail(x):
    raise ZeroDivisionError("no such colour")


def interrupt(x):
    raise KeyboardInterrupt


def stray(x):
    return x + 1


class TestDeath:
    @pytest.mark.sweep(size=1)
    @pytest.mark.parametrize("size", [2, 4])
    def test_a_rank_that_dies_ends_the_others_at_once(self, size):
        found = run_ranks(size, sample, die, timeout=50.0)
        assert found.pop(CULPRIT).died
        for outcome in found:
            assert isinstance(outcome.error, RankLost) and outcome.seconds < SOON, outcome
            assert "lost another rank at step 2" in str(outcome.error)
            assert f"of {size}" in str(outcome.error) and "timeout 50 s" in str(outcome.error)

    @pytest.mark.full  # waits; a rank that never comes is below
    def test_a_rank_that_hangs_ends_the_others_after_the_timeout(self):
        found = run_ranks(4, sample_beside_a_hanging_rank, timeout=4.0)
        for rank in {0, 2, 3}:
            outcome = found[rank]
            assert isinstance(outcome.error, RankLost), outcome
            assert 3.5 < outcome.seconds < 4.0 + SOON and "timeout 4 s" in str(outcome.error)

    def test_an_interrupted_rank_closes(self):
        found = run_ranks(2, sample, interrupt, timeout=50.0)
        assert isinstance(found[0].error, RankLost) and found[0].seconds < SOON
        assert isinstance(found[1].error, KeyboardInterrupt)


def sample_beside_a_hanging_rank(parallel):
    if parallel.rank == CULPRIT:
        return None  # to `_rank`, which sleeps with its sockets open
    return sample(parallel)


def sample_again(parallel, trouble, steps, everywhere=False):
    """The error of a generation in trouble, and the result of the next one."""
    try:
        if everywhere:
            parallel_trouble(parallel, trouble)
        else:
            sample(parallel, trouble, steps, steps)
    except Exception as error:
        first = f"{type(error).__name__}: {error}"
    return first, sample(parallel)


def parallel_trouble(parallel, trouble):
    with parallel.generation({}):
        trouble(torch.ones(1))


#: (steps of a generation, where the hosts meet next after step 1)
MEETINGS = [(12, "step 10"), (4, "the end, after 4 steps")]


class TestFailure:
    @pytest.mark.sweep(size=1, steps=1)
    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("steps, meeting", MEETINGS)
    def test_an_exception_reaches_every_rank_and_all_can_go_on(self, size, steps, meeting):
        found = values(run_ranks(size, sample_again, fail, steps, timeout=50.0))
        for rank, (error, after) in enumerate(found):
            if rank == CULPRIT:
                assert error == "ZeroDivisionError: no such colour"
            else:
                assert error.startswith(f"RankLost: rank {rank} stopped at {meeting}: ")
                assert "rank 1 failed after step 1: " in error
                assert error.endswith(": ZeroDivisionError: no such colour")
            assert after.eq(16).all()

    def test_each_rank_keeps_its_own_exception(self):
        for error, after in values(run_ranks(2, sample_again, fail, 4, True)):
            assert error == "ZeroDivisionError: no such colour" and after.eq(16).all()

    @pytest.mark.sweep(1)
    @pytest.mark.parametrize("steps, meeting", MEETINGS)
    def test_latents_that_differ_are_found(self, steps, meeting):
        for error, after in values(run_ranks(2, sample_again, stray, steps)):
            assert error.startswith(f"RanksDiffer: every rank must have the same at {meeting}; ")
            assert error.endswith("rank 1 in latents") and after.eq(16).all()


def stop_early(parallel, planned):
    try:
        sample(parallel, None, 3 if parallel.rank == CULPRIT else planned, planned)
    except RanksDiffer as error:
        return str(error), sample(parallel)


@pytest.mark.sweep(1)
@pytest.mark.parametrize("planned, meeting", MEETINGS)
def test_a_rank_that_stops_early_is_found(planned, meeting):
    for error, after in values(run_ranks(2, stop_early, planned)):
        assert f"rank 0 is at {meeting};" in error and after.eq(16).all()
        assert "rank 1 is at the end, after 3 steps" in error


def test_ranks_that_stop_early_together():
    for x in values(run_ranks(2, sample, None, 3, 12)):
        assert x.eq(8).all()


def other_plans(parallel):
    x = torch.ones(1, 4, 2, 2)
    active = [True, parallel.rank == CULPRIT]
    with parallel.generation({}):
        parallel.begin([parallel.exchange(active, 1, x.shape, x.dtype, x.device)])
        parallel.evaluate(lambda work: [x[None]] * len(work.objectives), x)


def test_ranks_that_would_exchange_other_outputs():
    for outcome in run_ranks(2, other_plans):
        assert isinstance(outcome.error, RanksDiffer)
        assert "rank 1 in which objectives run" in str(outcome.error)


def come_alone(parallel):
    if parallel.rank != CULPRIT:
        ObjectiveParallel(timeout=1.0)


def test_a_rank_that_never_comes():
    outcome = run_ranks(2, come_alone)[0]
    assert isinstance(outcome.error, RankLost) and outcome.seconds < 1.0 + SOON
    assert "rank 0 of 2 did not reach all others within 1 s" in str(outcome.error)


def use_after_close(parallel):
    parallel.close()
    parallel.close()
    sample(parallel)


def test_closed_ranks_say_so():
    for outcome in run_ranks(2, use_after_close):
        assert isinstance(outcome.error, RankLost) and "has left the group" in str(outcome.error)

# SPDX-License-Identifier: Apache-2.0
"""Serving processes that end: replaced, unless none can serve; and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msdda_fast.serve import workers
from msdda_fast.serve.workers import Workers
from tests.serve.conftest import until
from tests.serve.processes import deaf, fail, load_for_ever, serve


@pytest.fixture
def started(monkeypatch):
    monkeypatch.setattr(workers, "LONGEST_PAUSE_S", 0.05)
    made = []

    def start(run, count=1):
        made.append(Workers(run, [], count))
        return made[-1]

    yield start
    for one in made:
        one.stop(5)


def pids(some):
    return [worker.process.pid for worker in some._workers]


@pytest.mark.parametrize("run", [serve, load_for_ever])
def test_one_that_is_killed_is_replaced_however_young(started, run):
    some = started(run)
    (first,) = pids(some)
    os.kill(first, signal.SIGKILL)

    def is_replaced():
        some.tend()
        return pids(some) != [first] and some._workers[0].process.is_alive()

    until(is_replaced)


def test_one_that_fails_before_any_served_ends_the_service(started):
    some = started(fail)
    with pytest.raises(RuntimeError, match="code 3 before it served"):
        until(lambda: some.tend())


def test_one_that_fails_later_is_replaced(started):
    some = started(serve)
    until(lambda: some.tend() or some._have_served)
    (first,) = pids(some)
    os.kill(first, signal.SIGKILL)
    some._workers[0]._run = fail
    for _ in range(20):  # its successors fail, too, and are replaced in their turn
        some.tend()
        time.sleep(0.05)
    some._workers[0]._run = serve
    until(lambda: some.tend() or some._workers[0].serves())


def test_all_are_gone_after_a_stop_even_those_that_do_not_listen(started):
    some = started(deaf)
    until(lambda: some.tend() or some._have_served)
    some.stop(0.1)
    assert not some._workers[0].process.is_alive()


def test_none_outlives_a_killed_parent():
    command = [sys.executable, "-m", "tests.serve.processes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.kill()

    def is_gone():
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    until(is_gone)

# SPDX-License-Identifier: Apache-2.0
"""What test processes do; by itself, so that they start without loading a model's packages."""

import importlib.util
import signal
import sys
import time
from pathlib import Path


def alone():
    """The module under test without its package, which imports torch."""
    path = Path(__file__).parents[2] / "msdda_fast" / "serve" / "workers.py"
    spec = importlib.util.spec_from_file_location("workers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve(sockets, ready):
    ready.send(None)
    time.sleep(60)


def load_for_ever(sockets, ready):
    time.sleep(60)


def fail(sockets, ready):
    sys.exit(3)


def deaf(sockets, ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.send(None)
    time.sleep(60)


def obey(sockets, ready):
    alone().stop_with_parent()
    ready.send(None)
    time.sleep(60)


if __name__ == "__main__":  # a parent, which says who its child is
    from tests.serve.processes import obey as named  # which the child can import

    workers = alone().Workers(named, [], 1)
    while not workers._workers[0].serves():
        time.sleep(0.01)
    print(workers._workers[0].process.pid, flush=True)
    time.sleep(60)

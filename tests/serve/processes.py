# SPDX-License-Identifier: Apache-2.0
"""What test processes do; by itself, so that they start without loading a model's packages."""

import signal
import sys
import time


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

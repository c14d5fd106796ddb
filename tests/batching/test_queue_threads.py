# SPDX-License-Identifier: Apache-2.0
"""Threads that submit at the same time do not both see the room that one of them takes."""

import threading
import time
from collections import deque
from types import SimpleNamespace

from msdda_fast.batching.queue import TicketQueue
from msdda_fast.errors import QueueFull
from tests.batching.conftest import limits


class Slow(deque):
    """Takes its time to grow: who looks at it meanwhile sees it as it was."""

    def extend(self, tickets):
        time.sleep(0.05)
        super().extend(tickets)


def test_room_is_looked_for_and_taken_at_once():
    line, refused = TicketQueue(limits(client_limit=6)), []
    line._lines[None] = Slow()
    ready = threading.Barrier(4)

    def stand():
        ready.wait()
        try:
            line.put([SimpleNamespace(shape="a", client=None) for _ in range(4)])
        except QueueFull as error:
            refused.append(error)

    threads = [threading.Thread(target=stand) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(line) == 4 and len(refused) == 3

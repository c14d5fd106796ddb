# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom: batches out of a line of tickets, by a clock that tests set."""

import math
import threading
from types import SimpleNamespace

import pytest

from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.ticket import Chore
from msdda_fast.errors import EngineClosed, QueueFull


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def line(clock):
    return TicketQueue(max_batch=3, max_wait_s=2.0, limit=6, clock=clock)


@pytest.fixture
def join(line, clock):
    def stand(shape, count=1, expires=math.inf):
        tickets = [
            SimpleNamespace(shape=shape, arrived=clock.now, expires=expires) for _ in range(count)
        ]
        line.join(tickets)
        return tickets

    return stand


def test_a_full_batch_goes_at_once(line, join):
    tickets = join("a", 4)
    assert line.take().batch == tickets[:3]
    assert len(line) == 1


def test_a_lonely_ticket_waits_as_long_as_it_may_and_no_longer(line, join, clock):
    (ticket,) = join("a")
    waits = []

    def wait(timeout):
        waits.append(timeout)
        clock.now += timeout

    line._changed.wait = wait
    assert line.take().batch == [ticket]
    assert waits == [2.0]


def test_a_ticket_that_waited_behind_a_batch_does_not_wait_again(line, join, clock):
    (ticket,) = join("a")
    clock.now += 2.0
    assert line.take().batch == [ticket]


def test_the_oldest_is_always_served_with_the_next_of_its_shape(line, join):
    first, other, second = join("a") + join("b") + join("a")
    fuller = join("b", 2)
    assert line.take().batch == [first, second]
    assert line.take().batch == [other, *fuller]


def test_nobody_idles_while_others_wait(line, join):
    (first,) = join("a")
    join("b")
    line._changed.wait = pytest.fail
    assert line.take().batch == [first]


def test_all_join_or_none(line, join):
    join("a", 4)
    with pytest.raises(QueueFull, match="4 of at most 6 images are waiting, 3 more"):
        join("a", 3)
    assert len(line) == 4
    join("a", 2)


def test_who_leaves_is_not_drawn_and_makes_room(line, join):
    tickets = join("a", 6)
    line.leave(tickets[1])
    line.leave(tickets[1])
    assert line.take().batch == [tickets[0], *tickets[2:4]]
    join("a", 4)


def test_late_tickets_come_out_before_anything_else(line, join, clock):
    late, fine = join("a", expires=101.0) + join("a")
    clock.now = 101.0
    taken = line.take()
    assert taken.late == [late] and not taken.batch
    clock.now = 102.0
    assert line.take().batch == [fine]


def test_the_line_wakes_for_a_ticket_that_expires_before_its_company_comes(line, join, clock):
    (ticket,) = join("a", expires=100.5)
    line._changed.wait = lambda timeout: setattr(clock, "now", clock.now + timeout)
    assert line.take().late == [ticket]
    assert clock.now == 100.5


def test_chores_come_first(line, join):
    join("a", 3)
    chore = Chore(lambda: None)
    line.add(chore)
    assert line.take().chore is chore
    assert line.take().batch


def test_a_closed_line_drains_without_waiting_for_company(line, join):
    (ticket,) = join("a")
    chore = Chore(lambda: None)
    line.add(chore)
    assert line.close(drain=True) == [chore]
    assert line.take().batch == [ticket]
    assert line.take() is None
    for enter in (lambda: join("a"), lambda: line.add(Chore(lambda: None))):
        with pytest.raises(EngineClosed):
            enter()


def test_a_line_closed_without_draining_gives_back_who_is_there(line, join):
    tickets, chore = join("a", 2), Chore(lambda: None)
    line.add(chore)
    assert line.close(drain=False) == [chore, *tickets]
    assert line.take() is None


def test_a_waiting_thread_wakes_up(line, join):
    taken = []
    thread = threading.Thread(target=lambda: taken.append(line.take()))
    thread.start()
    tickets = join("a", 3)
    thread.join(10)
    assert taken[0].batch == tickets

# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom: batches out of a queue of tickets, by a clock that tests set."""

import math
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest

from msdda_fast.batching.queue import TicketQueue
from msdda_fast.batching.ticket import Chore
from msdda_fast.errors import EngineClosed, QueueFull
from tests.batching.conftest import limits


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(clock):
    return TicketQueue(limits(), clock=clock)


@pytest.fixture
def put(queue, clock):
    def add(shape, count=1, expires=math.inf, client=None):
        fields = dict(shape=shape, arrived=clock.now, expires=expires, client=client)
        tickets = [SimpleNamespace(**fields) for _ in range(count)]
        queue.put(tickets)
        return tickets

    return add


def test_a_full_batch_goes_at_once(queue, put):
    tickets = put("a", 4)
    assert queue.take().batch == tickets[:3]
    assert len(queue) == 1


def test_a_lonely_ticket_waits_as_long_as_it_may_and_no_longer(queue, put, clock):
    (ticket,) = put("a")
    waits = []

    def wait(timeout):
        waits.append(timeout)
        clock.now += timeout

    queue._changed.wait = wait
    assert queue.take().batch == [ticket]
    assert waits == [2.0]


def test_a_ticket_that_waited_behind_a_batch_does_not_wait_again(queue, put, clock):
    (ticket,) = put("a")
    clock.now += 2.0
    assert queue.take().batch == [ticket]


def test_the_oldest_is_served_with_the_next_of_its_shape(queue, put):
    first, other, second = put("a") + put("b") + put("a")
    fuller = put("b", 2)
    assert queue.take().batch == [first, second]
    assert queue.take().batch == [other, *fuller]


def test_nobody_idles_while_others_wait(queue, put):
    (first,) = put("a")
    put("b")
    queue._changed.wait = pytest.fail
    assert queue.take().batch == [first]


def test_all_are_put_or_none(queue, put):
    put("a", 4)
    with pytest.raises(QueueFull, match="4 of at most 6 images are waiting, 3 more"):
        put("a", 3)
    assert len(queue) == 4
    put("a", 2)


class TestClients:
    @pytest.fixture(autouse=True)
    def no_waits(self, queue):
        queue._changed.wait = pytest.fail

    def test_take_turns_in_a_batch(self, queue, put, clock):
        (first, second, third), (small,) = put("a", 3, client="greedy"), put("a", client="small")
        assert queue.take().batch == [first, small, second]
        clock.now += 2.0
        assert queue.take().batch == [third]

    def test_take_turns_from_batch_to_batch_whatever_the_shapes(self, queue, put):
        greedy, small = put("a", 2, client="greedy"), put("b", client="small")
        late = put("c", client="late")
        assert queue.take().batch == greedy
        greedy = put("a", 3, client="greedy")
        assert [queue.take().batch for _ in range(3)] == [small, late, greedy]

    def test_keep_to_their_own_order(self, queue, put, clock):
        one, two = put("a", client="x") + put("b", client="x")
        other = put("b", client="y")
        clock.now += 2.0
        assert [queue.take().batch for _ in range(2)] == [[one], [*other, two]]

    def test_wait_for_company_from_when_the_first_of_them_came(self, queue, put, clock):
        put("a", client="x")
        put("b", client="y")
        queue.take()
        clock.now += 1.5
        put("b", client="x")
        clock.now += 0.5
        assert [ticket.client for ticket in queue.take().batch] == ["y", "x"]

    def test_have_a_bound_of_their_own(self, queue, put):
        put("a", 3, client="greedy")
        with pytest.raises(QueueFull, match="'greedy' has 3 images waiting and may have 3") as full:
            put("a", client="greedy")
        assert full.value.client == "greedy"
        queue.take()
        put("a", 3, client="greedy")

    def test_however_many_leave_a_place_for_the_next(self, put):
        for client in [f"greedy {i}" for i in range(5)] * 3:
            with suppress(QueueFull):
                put("a", client=client)
        put("a", client="small")
        with pytest.raises(QueueFull, match="6 of at most 6 images are waiting") as full:
            put("a", client="next")
        assert full.value.client is None

    def test_none_is_bounded_by_the_queue_alone(self, queue, put):
        put("a", 6)
        assert len(queue) == 6

    def test_who_leaves_is_forgotten(self, queue, put, clock):
        gone, late = put("a", client="gone") + put("a", client="late", expires=clock.now)
        queue.remove(gone)
        assert queue.take().late == [late]
        assert not queue._lines


def test_a_removed_ticket_is_not_drawn_and_makes_room(queue, put):
    tickets = put("a", 6)
    queue.remove(tickets[1])
    queue.remove(tickets[1])
    assert queue.take().batch == [tickets[0], *tickets[2:4]]
    put("a", 4)


def test_late_tickets_come_out_before_anything_else(queue, put, clock):
    late, fine = put("a", expires=101.0) + put("a")
    clock.now = 101.0
    taken = queue.take()
    assert taken.late == [late] and not taken.batch
    clock.now = 102.0
    assert queue.take().batch == [fine]


def test_the_queue_wakes_for_a_ticket_that_expires_before_its_company_comes(queue, put, clock):
    (ticket,) = put("a", expires=100.5)
    queue._changed.wait = lambda timeout: setattr(clock, "now", clock.now + timeout)
    assert queue.take().late == [ticket]
    assert clock.now == 100.5


def test_chores_come_first(queue, put):
    put("a", 3)
    chore = Chore(lambda: None)
    queue.add(chore)
    assert queue.take().chore is chore
    assert queue.take().batch


def test_a_closed_queue_drains_without_waiting_for_company(queue, put):
    (ticket,) = put("a")
    chore = Chore(lambda: None)
    queue.add(chore)
    assert queue.close(drain=True) == [chore]
    assert queue.take().batch == [ticket]
    assert queue.take() is None
    for enter in (lambda: put("a"), lambda: queue.add(Chore(lambda: None))):
        with pytest.raises(EngineClosed):
            enter()


def test_a_queue_closed_without_draining_gives_back_who_is_there(queue, put):
    tickets, chore = put("a", 2), Chore(lambda: None)
    queue.add(chore)
    assert queue.close(drain=False) == [chore, *tickets]
    assert queue.take() is None


def test_a_waiting_thread_wakes_up(queue, put):
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    tickets = put("a", 3)
    thread.join(10)
    assert taken[0].batch == tickets

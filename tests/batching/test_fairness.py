# SPDX-License-Identifier: Apache-2.0
"""What one client does costs no other its images."""

import threading
import time
from contextlib import suppress

import pytest
import torch

import msdda_fast as mf
from msdda_fast.batching.drawing import BatchDrawer

SOON = 30  # seconds; every wait is bounded


@pytest.fixture
def engine(tiny, monkeypatch):
    """Draws in no time, two at once, and has a short queue."""

    def sample(self, batch, *, size, watch):
        time.sleep(0.001)
        return torch.zeros(len(batch), 4, 8, 8)

    monkeypatch.setattr(BatchDrawer, "sample", sample)
    options = dict(max_batch=2, max_wait_ms=0, queue_limit=8, output_type="latent")
    with mf.Engine(tiny.shared(), **options) as engine:
        yield engine


@pytest.mark.parametrize("greedy", [1, 3], ids=["one", "three"])
def test_greedy_clients_leave_a_small_one_its_images(engine, greedy):
    over, drawn = threading.Event(), []

    def grab(client, steps):
        while not over.is_set():
            try:
                engine.submit(ask(steps), client=client).result(SOON)
                drawn.append(client)
            except mf.QueueFull:
                time.sleep(0.02)

    def ask(steps):
        return mf.ImageRequest("a red dog", num_inference_steps=steps)

    threads = [
        threading.Thread(target=grab, args=(f"greedy {i % greedy}", 1 + i % 3)) for i in range(12)
    ]
    for thread in threads:
        thread.start()
    served = 0
    for _ in range(10):
        with suppress(mf.QueueFull):
            engine.submit(ask(1), client="small").result(SOON)
            served += 1
    over.set()
    for thread in threads:
        thread.join(SOON)
    assert served == 10
    assert {f"greedy {i}" for i in range(greedy)} == set(drawn)  # nor does it cost them theirs

# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest

from msdda_fast.engine import graph
from tests.engine.small_world import TracedGraphs
from tests.tiny_model import calls, one_thread, pipe, tiny, tiny_kl  # noqa: F401 - fixtures


class CountedGraphs(TracedGraphs):
    """Counts, and runs the step again instead of tracing it, which takes a second."""

    def capture(self, advance, buffers):
        self.captures += 1
        return SimpleNamespace(replay=lambda: advance(buffers), release=lambda: None)


@pytest.fixture
def counted(monkeypatch) -> CountedGraphs:
    made = CountedGraphs()
    monkeypatch.setattr(graph, "graphs_for", lambda device: made)
    return made

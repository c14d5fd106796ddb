# SPDX-License-Identifier: Apache-2.0
"""What `CudaGraphs` and `SideBySide` ask of torch.cuda, in order, where there is no GPU to ask."""

import contextlib
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from msdda_fast.engine.buffers import StepBuffers
from msdda_fast.engine.graph_backends import CudaGraphs
from msdda_fast.engine.side_by_side import SideBySide
from tests.engine.small_world import KEY


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A torch.cuda that writes down what it is asked for."""
    log: list[str] = []
    streams = [FakeStream(log, "main")]
    made = iter(("side", "side 2"))
    pools = iter(("pool", "new pool"))

    class CUDAGraph:
        def replay(self) -> None:
            log.append("replay")

        def reset(self) -> None:
            log.append("reset")

    @contextmanager
    def stream(chosen: FakeStream):
        streams.append(chosen)
        try:
            yield
        finally:
            streams.pop()

    @contextmanager
    def graph(graph: CUDAGraph, pool: str, stream: FakeStream, capture_error_mode="global"):
        log.append(f"capture into {pool} on {stream.name}, errors {capture_error_mode}")
        yield
        log.append("end capture")

    @contextmanager
    def device(chosen: torch.device):
        yield

    def end_pool(device: int, pool: str) -> None:
        if "capture ended" in log:
            raise RuntimeError("not currently recording to this pool")
        log.append(f"{pool} of {device} is ended")

    def release_pool(device: int, pool: str) -> None:
        log.append(f"{pool} of {device} is released")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release_pool)
    fake = {
        "CUDAGraph": CUDAGraph,
        "current_device": lambda: 0,
        "Stream": lambda device: FakeStream(log, next(made)),
        "current_stream": lambda device=None: streams[-1],
        "device": device,
        "graph": graph,
        "graph_pool_handle": lambda: next(pools),
        "mem_get_info": lambda device: (100, 1000),
        "memory_allocated": lambda device: 20,
        "memory_reserved": lambda device: 50,
        "stream": stream,
        "synchronize": lambda device: log.append("synchronize"),
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_warm_up_and_capture_run_on_one_side_stream(log: list[str]) -> None:
    graphs, counters = CudaGraphs("cuda"), []

    def advance(buffers: StepBuffers) -> None:
        log.append(f"step on {torch.cuda.current_stream().name}")
        counters.append(int(buffers.counter))
        buffers.counter.add_(1)

    graph = graphs.capture(advance, StepBuffers.allocate(KEY, "cpu"))
    graph.replay()
    graph.release()
    assert log == [
        "side waits for main",
        *["step on side"] * 3,
        "capture into pool on side, errors thread_local",
        "step on side",
        "end capture",
        "main waits for side",
        "replay",
        "synchronize",
        "reset",
    ]
    assert counters[:3] == [0, 0, 0]
    assert graphs.free_bytes() == 130


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("log")
def test_convolutions_are_timed_for_a_graph_unless_torch_is_to_be_deterministic(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    seen = []

    def advance(buffers: StepBuffers) -> None:
        seen.append(torch.backends.cudnn.benchmark)

    CudaGraphs("cuda").capture(advance, StepBuffers.allocate(KEY, "cpu"))
    assert seen == [not deterministic] * 4
    assert torch.backends.cudnn.benchmark is False


def test_after_a_capture_that_failed_another_ends_well(log: list[str]) -> None:
    graphs, calls = CudaGraphs("cuda"), iter(range(10))

    def advance(buffers: StepBuffers) -> None:
        if next(calls) == 3:
            raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(advance, StepBuffers.allocate(KEY, "cpu"))
    assert log[1:] == [
        "capture into pool on side, errors thread_local",
        "pool of 0 is ended",
        "pool of 0 is released",
        "capture into new pool on side, errors global",
        "end capture",
    ]
    assert torch.cuda.current_stream().name == "main"


def test_a_capture_that_ended_by_itself_keeps_its_pool(log: list[str]) -> None:
    graphs, calls = CudaGraphs("cuda:1"), iter(range(10))

    def advance(buffers: StepBuffers) -> None:
        if next(calls) == 3:
            log.append("capture ended")
            raise RuntimeError("of the step's own")

    with pytest.raises(RuntimeError, match="own"):
        graphs.capture(advance, StepBuffers.allocate(KEY, "cpu"))
    assert not [line for line in log if "is released" in line]


def test_the_graph_of_a_failed_capture_outlives_it(log: list[str], monkeypatch) -> None:
    made = []
    graph_class = torch.cuda.CUDAGraph
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: made.append(weakref.ref(own := graph_class())) or own
    )
    graphs, calls = CudaGraphs("cuda"), iter(range(10))

    def advance(buffers: StepBuffers) -> None:
        if next(calls) == 3:
            raise RuntimeError("not permitted when stream is capturing")

    with contextlib.suppress(RuntimeError):
        graphs.capture(advance, StepBuffers.allocate(KEY, "cpu"))
    gc.collect()
    assert made[0]() is not None


def test_networks_fork_from_the_current_stream_and_join_it(log: list[str]) -> None:
    class Output:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_stream(self, stream: FakeStream) -> None:
            log.append(f"{self.name} is kept for {stream.name}")

    class Network:
        def __init__(self, name: str) -> None:
            self.output = Output(name)

        def __call__(self, next_input, k) -> list[object]:
            log.append(f"{self.output.name} runs on {torch.cuda.current_stream().name}")
            return [self.output, None]

    networks = [Network(name) for name in "abc"]
    both, x = SideBySide(networks), torch.zeros(1, *KEY.shape)
    for _ in range(2):
        log.clear()
        outputs = both._forked(x, torch.tensor(0))
        assert outputs == [part for n in networks for part in (n.output, None)]
        assert log == [
            "main records",
            "side waits for event of main",
            "b runs on side",
            "side 2 waits for event of main",
            "c runs on side 2",
            "a runs on main",
            "main waits for side",
            "main waits for side 2",
            "b is kept for main",
            "c is kept for main",
        ]

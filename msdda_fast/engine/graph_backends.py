# SPDX-License-Identifier: Apache-2.0
"""Recorders of steps: CUDA graphs. Tests substitute a recorder that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from msdda_fast.engine.buffers import StepBuffers
from msdda_fast.torch_private import abandon_pool

__all__ = ["Advance", "CudaGraphs", "Graph", "GraphBackend", "Move", "graphs_for"]

#: One step on buffers, in place.
Advance = Callable[[StepBuffers], None]

#: cuBLAS, cuDNN and Triton choose kernels and allocate workspaces in their first calls on a stream.
WARM_UP_STEPS = 3


class Counted(Protocol):
    """Buffers with a counter of steps, 0-d int64."""

    @property
    def counter(self) -> Tensor:
        """Reset before each step that only warms up."""


B = TypeVar("B", bound=Counted)


class Graph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Repeat the step on the storage that was recorded."""

    def release(self) -> None:
        """Free its memory; it can no longer be replayed."""


@dataclass(slots=True)
class Move:
    """A step of one kind.

    Attributes:
        advance: What runs where there is no graph of it.
        graph: Replayed in its place; None: there is none.
        finish: What follows either; None: nothing.
    """

    advance: Advance
    graph: Graph | None
    finish: Advance | None

    def __call__(self, buffers: StepBuffers) -> None:
        """Do the step on `buffers`, those that were recorded."""
        with torch.no_grad():
            if self.graph is not None:
                self.graph.replay()
            else:
                self.advance(buffers)
            if self.finish is not None:
                self.finish(buffers)


class GraphBackend(Protocol):
    """Records steps one at a time; recorded steps never run at the same time."""

    def capture(self, advance: Callable[[B], None], buffers: B) -> Graph:
        """Warm up `advance` on `buffers` and record it; may change `x`, the input and the counter.

        Raises:
            RuntimeError: Some operation cannot be recorded.
        """

    def free_bytes(self) -> int:
        """Return the bytes of device memory that a new graph could use."""


class CudaGraphs:
    """CUDA graphs in one memory pool, recorded on one side stream.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(self, advance: Callable[[B], None], buffers: B) -> Graph:
        """Warm `advance` up on the side stream, then record it; see `GraphBackend.capture`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        # a capture that fails does not restore the current stream; the outer context does
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            _timed_convolutions(),
        ):
            for _ in range(WARM_UP_STEPS):
                buffers.counter.zero_()  # stay within tables that are shorter than the warm-up
                advance(buffers)
            try:
                # thread_local: other threads may allocate meanwhile
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    advance(buffers)
            except RuntimeError:
                self._recover(graph, buffers)
                raise
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return _CudaGraph(graph, self._device)

    def _recover(self, graph: torch.cuda.CUDAGraph, buffers: Counted) -> None:
        """Restore PyTorch's state after a capture that failed.

        Its allocator still has the pool of the capture, and until a capture succeeds its default
        generator behaves as if captured ("Offset increment outside graph capture").
        """
        self._failed.append(graph)  # its end would touch the pool once more
        index = self._device.index
        abandon_pool(torch.cuda.current_device() if index is None else index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=self._pool, stream=self._stream):
            buffers.counter.add_(1)

    def free_bytes(self) -> int:
        """Return what the driver has free plus what the allocator has reserved and not in use."""
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        return free + reserved - torch.cuda.memory_allocated(self._device)


@contextmanager
def _timed_convolutions() -> Iterator[None]:
    """A context in which cuDNN times its algorithms for each new shape and keeps the fastest.

    A graph replays one choice forever, so it is worth the milliseconds. The fastest may differ from
    run to run, and with it the last bits: whoever asked torch to be deterministic gets no timing.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = before or not deterministic
    try:
        yield
    finally:
        cudnn.benchmark = before


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph = graph
        self._device = device

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        torch.cuda.synchronize(self._device)  # replays may still be running
        self._graph.reset()


def graphs_for(device: torch.device | str) -> GraphBackend | None:
    """Return the recorder for this device, or None if it has no graphs."""
    return CudaGraphs(device) if torch.device(device).type == "cuda" else None

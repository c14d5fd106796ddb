# SPDX-License-Identifier: Apache-2.0
"""One captured step, replayed T times; a bounded cache of such steps, one per shape.

A replay reads its step from a counter on the device, and all that distinguishes requests lies in
static buffers: weights, prompts, seeds, guidance, etas and the number of steps change without a new
capture. A network with several kinds of step has one graph per kind, all captured at once; a
request gives the kind of each step. Without graphs (on the CPU) steps run eagerly or compiled. Of
steps that processes share, the graph is this one's share of the networks.
"""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.compiled import compiled
from msdda_fast.engine.dry_run import dry_run
from msdda_fast.engine.graph_backends import Advance, Graph, GraphBackend, Move, graphs_for
from msdda_fast.engine.loop import run
from msdda_fast.engine.step import Network, Step
from msdda_fast.errors import CaptureError, InvalidShape
from msdda_fast.steps.coefficients import CoefficientTable

if TYPE_CHECKING:
    from msdda_fast.types import SeedsLike

__all__ = ["Capture", "CapturedStep", "StepCache", "cause"]

logger = logging.getLogger(__name__)

#: "auto": where the device can, with a warning where a step cannot; "required": or raise; "off".
Capture: TypeAlias = Literal["auto", "required", "off"]

N = TypeVar("N", bound=Network)

#: Address, shape, strides and dtype.
_Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class CapturedStep(Generic[N]):
    """A step with its buffers, made by `StepCache.prepare`: `load` a request, then do its steps.

    It is an `engine.loop.Generation` of the request loaded last.
    """

    def __init__(self, network: N, buffers: StepBuffers, moves: Mapping[str, Move]) -> None:
        self.buffers = buffers
        self.network = network
        self._moves = moves
        self._places = _places(network, buffers) if self._graphs() else {}
        self._plan: list[Move] = []
        self._next = 0

    @property
    def is_captured(self) -> bool:
        """Whether steps of every kind replay a graph."""
        return len(self._graphs()) == len(self._moves)

    @property
    def x(self) -> Tensor:
        """The state, (B, *S) float32; the next step overwrites it."""
        return self.buffers.x

    def load(
        self,
        table: CoefficientTable,
        x_T: Tensor,
        *,
        seeds: SeedsLike | None = None,
        noise: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        kinds: Sequence[str] | None = None,
    ) -> None:
        """Write a request for one run into the buffers; see `StepBuffers.load`.

        Args:
            kinds: The kind of each of its T steps; needed if the network has several.

        Raises:
            ValueError: `kinds` does not give one known kind per step.
        """
        if kinds is None and len(self._moves) == 1:
            kinds = list(self._moves) * len(table)
        if kinds is None or len(kinds) != len(table) or not self._moves.keys() >= set(kinds):
            known = sorted(self._moves)
            raise ValueError(
                f"kinds is {kinds}, expected one of {known} for each of the {len(table)} steps"
            )
        self.buffers.load(table, x_T, seeds=seeds, noise=noise, conditioning=conditioning)
        self._plan, self._next = [self._moves[kind] for kind in kinds], 0

    def run(self) -> Tensor:
        """Do all steps of the loaded request and return a copy of x_0, (B, *S) float32.

        Raises:
            ValueError, CaptureError: See `step`.
        """
        return run(self, max(len(self._plan), 1)).clone()

    def step(self, k: int) -> None:
        """Do step k of the loaded request; do each step once, in order.

        Between steps `buffers.x` may be read, and `buffers.replace_x` or `replace_conditioning`
        called. Later steps may be left out.

        Raises:
            ValueError: Step k is not the next one, or no request is loaded.
            CaptureError: A tensor of the network or of the conditioning has moved since capture.
        """
        if k != self._next or k >= len(self._plan):
            raise ValueError(
                f"cannot do step {k}, {self._next} of {len(self._plan)} steps are done: load() a "
                "request before each run, and do its steps in order"
            )
        if k == 0:
            self._check_places()
        self._next += 1
        self._plan[k](self.buffers)

    def release(self) -> None:
        """Free the graphs; later runs are eager or compiled, with the same result."""
        for graph in self._graphs():
            graph.release()
        for move in self._moves.values():
            move.graph = None

    def _graphs(self) -> list[Graph]:
        return [move.graph for move in self._moves.values() if move.graph is not None]

    def _check_places(self) -> None:
        if not self._graphs():
            return
        now = _places(self.network, self.buffers)
        if now == self._places:
            return
        moved = [name for name in self._places | now if self._places.get(name) != now.get(name)]
        raise CaptureError(
            f"the storage of {moved[0]!r} changed after capture ({len(moved)} tensors in all): "
            "update weights in place (copy_), or clear the cache and prepare again after "
            ".to(), .half() or loading"
        )


class StepCache(Generic[N]):
    """Captured steps by shape, evicted by least recent use; their graphs share one memory pool.

    Steps of one cache run one at a time, on one thread.

    Args:
        build: Makes the network for a shape; may read the buffers and add to their `conditioning`.
        device: Device of the buffers and of the network.
        capacity: Most shapes kept, at least 1.
        capture: "auto" captures where it can, "required" raises where it cannot; or "off".
        compile: Pass steps through `torch.compile` first; see `engine.compiled`.
        backend: Backend of the fused step: "auto", or one by name.
        graphs: Recorder of steps; None: the device's own.

    Raises:
        CaptureError: `capture="required"` on a device without graphs.
    """

    def __init__(
        self,
        build: Callable[[ShapeKey, StepBuffers], N],
        *,
        device: torch.device | str,
        capacity: int = 8,
        capture: Capture = "auto",
        compile: bool = False,
        backend: str = "auto",
        graphs: GraphBackend | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        if capture not in ("auto", "required", "off"):
            raise ValueError(f"capture must be 'auto', 'required' or 'off', got {capture!r}")
        self._build = build
        self._device = torch.device(device)
        self._capacity = capacity
        self._capture: Capture = capture
        self._compile = compile
        self._backend = backend
        self._graphs = None if capture == "off" else graphs or graphs_for(self._device)
        if capture == "required" and self._graphs is None:
            raise CaptureError(f"capture='required', but device {self._device} has no graphs")
        self._steps: OrderedDict[ShapeKey, CapturedStep[N]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, key: ShapeKey) -> bool:
        return key in self._steps

    def __iter__(self) -> Iterator[CapturedStep[N]]:
        return iter(self._steps.values())

    def prepare(self, key: ShapeKey) -> CapturedStep[N]:
        """Return the step for `key`; the first time, build, compile and capture it.

        Raises:
            InvalidShape: The step needs more memory than is free (nothing was captured yet), or the
                network's outputs do not fit the key.
            CaptureError: It cannot be compiled or captured, and `capture` is "required"; otherwise
                a warning is logged, and the step runs eagerly.
        """
        if key in self._steps:
            self._steps.move_to_end(key)
            return self._steps[key]
        while len(self._steps) >= self._capacity:
            self._steps.popitem(last=False)[1].release()
        self._steps[key] = self._make(key)
        return self._steps[key]

    def clear(self) -> None:
        """Free all steps."""
        while self._steps:
            self._steps.popitem()[1].release()

    def _make(self, key: ShapeKey) -> CapturedStep[N]:
        if self._graphs is not None:
            self._check_fits("buffers", StepBuffers.nbytes(key), key, self._graphs)
        buffers = StepBuffers.allocate(key, self._device)
        network = self._build(key, buffers)
        moves = {}
        for kind, predict in network.kinds.items():
            step = Step(predict, key, device=self._device, backend=self._backend)
            try:
                moves[kind] = self._accelerate(step, buffers)
            except CaptureError as error:
                if self._capture == "required":
                    raise
                logger.warning("%s; it runs eagerly instead", error)
                moves[kind] = Move(step.advance, None, step.finish)
        return CapturedStep(network, buffers, moves)

    def _accelerate(self, step: Step, buffers: StepBuffers) -> Move:
        """Compile and capture the step, each if enabled."""
        advance: Advance = step.advance
        if self._graphs is not None:
            needed = dry_run(advance, buffers).peak_bytes
            self._check_fits("activations", needed, buffers.key, self._graphs)
        try:
            with buffers.kept(), torch.no_grad():
                if self._compile:
                    advance = compiled(advance, self._device.type)
                    advance(buffers)
                graph = None if self._graphs is None else self._graphs.capture(advance, buffers)
        except RuntimeError as error:
            failed = "compiled or captured" if self._compile else "captured"
            raise CaptureError(f"the step cannot be {failed}: {cause(error)}") from error
        return Move(advance, graph, step.finish)

    def _check_fits(self, what: str, needed: int, key: ShapeKey, graphs: GraphBackend) -> None:
        free = graphs.free_bytes()
        if needed > free:
            raise InvalidShape(
                f"a step of shape (B, *S) = {key.shape} needs about {needed / 2**30:.3g} GiB for "
                f"its {what} and {free / 2**30:.3g} GiB are free on {self._device}; use a "
                "smaller batch or size"
            )


def _places(network: Network, buffers: StepBuffers) -> dict[str, _Place]:
    return {
        name: (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        for name, tensor in {**network.storages(), **buffers.conditioning}.items()
    }


def cause(error: BaseException) -> str:
    """Return the first error of a chain and its line; ending a capture raises further errors."""
    while error.__context__ is not None:
        error = error.__context__
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} (in {frames[-1].name}, at {frames[-1].line})" if frames else text

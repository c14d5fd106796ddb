# SPDX-License-Identifier: Apache-2.0
"""Forwards of a network as graphs, one per kind of arguments, for loops that are not captured.

Arguments are copied into tensors at fixed addresses, the graph is replayed, and outputs are copied
out, since a loop may hold them while it calls the network again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdda_fast.engine.compiled import without_compiling
from msdda_fast.engine.dry_run import dry_run
from msdda_fast.engine.graph import cause
from msdda_fast.engine.graph_backends import Graph, GraphBackend
from msdda_fast.errors import CaptureError
from msdda_fast.torch_private import tree_flatten, tree_unflatten

__all__ = ["ForwardBuffers", "NetworkGraphs"]

#: Largest relative difference between the first replay and the forward as it is written. Replays
#: are the same kernels; only sums by atomic additions may round differently.
_TOLERANCE = 1e-2
#: Most values of other arguments for the same shapes: these are switches.
_VALUES = 4


@dataclass(frozen=True, slots=True)
class ForwardBuffers:
    """What a captured forward reads and writes.

    Attributes:
        inputs: The tensors among the arguments, in order.
        outputs: The tensors among the results, in order.
        counter: 0-d int64, which every recorder resets; a forward does not read it.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    counter: Tensor


@dataclass(frozen=True, slots=True)
class _Forward:
    buffers: ForwardBuffers
    graph: Graph
    results: Sequence[Any]  # with `outputs` in the places of tensors
    spec: Any


class NetworkGraphs:
    """Graphs of one network, evicted by least recent use; they share one memory pool.

    Whoever moves the network's weights, or changes what its forward does, calls `clear`.

    Args:
        graphs: The recorder.
        capacity: Most kinds of arguments kept, at least 1.
    """

    def __init__(self, graphs: GraphBackend, *, capacity: int = 8) -> None:
        self._graphs = graphs
        self._capacity = capacity
        self._forwards: OrderedDict[object, _Forward] = OrderedDict()
        self._seen: dict[object, set[object]] = {}

    def __len__(self) -> int:
        return len(self._forwards)

    def run(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:  # noqa: ANN401 - what the network returns
        """Return `forward(*args, **kwargs)`; the first time of a kind, capture it.

        A kind is the nesting, shapes, dtypes and devices of tensors, and all other values.

        Raises:
            CaptureError: It cannot be captured; the message says why.
        """
        leaves, spec = tree_flatten((list(args), dict(kwargs)))
        key = (str(spec), tuple(_kind(leaf) for leaf in leaves))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found = self._forwards.get(key)
        if found is None:
            self._check(key, tensors)
            while len(self._forwards) >= self._capacity:
                self._forwards.popitem(last=False)[1].graph.release()
            found = self._forwards[key] = self._capture(forward, leaves, spec)
        self._forwards.move_to_end(key)
        for own, given in zip(found.buffers.inputs, tensors, strict=True):
            own.copy_(given)
        found.graph.replay()
        outputs = [output.clone() for output in found.buffers.outputs]
        return tree_unflatten(_filled(found.results, outputs), found.spec)

    def clear(self) -> None:
        """Free all graphs."""
        self._seen.clear()
        while self._forwards:
            self._forwards.popitem()[1].graph.release()

    def _check(self, key: tuple[str, Any], tensors: Sequence[Tensor]) -> None:
        """Check that a graph would read its arguments anew, and be used again."""
        devices = sorted({str(tensor.device) for tensor in tensors})
        if len(devices) > 1:  # a kernel takes a number on the host as it is at capture
            raise CaptureError(f"its arguments are on {devices}")
        seen = self._seen.setdefault((key[0], tuple(map(_kind, tensors))), set())
        seen.add(key)
        if len(seen) > _VALUES:
            raise CaptureError("an argument that is no tensor changes from call to call")

    def _capture(self, forward: Callable[..., Any], leaves: Sequence[Any], spec: Any) -> _Forward:  # noqa: ANN401
        inputs = [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]

        def results(own: Sequence[Tensor]) -> tuple[list[Any], Any]:
            args, kwargs = tree_unflatten(_filled(leaves, own), spec)
            return tree_flatten(forward(*args, **kwargs))

        def advance(buffers: ForwardBuffers) -> None:
            made = [leaf for leaf in results(buffers.inputs)[0] if isinstance(leaf, Tensor)]
            for own, value in zip(buffers.outputs, made, strict=True):
                own.copy_(value)

        written, out_spec = results(inputs)
        outputs = [leaf for leaf in written if isinstance(leaf, Tensor)]
        counter = torch.zeros((), dtype=torch.int64, device=inputs[0].device)
        buffers = ForwardBuffers(inputs, [torch.empty_like(out) for out in outputs], counter)
        with without_compiling():
            needed = dry_run(advance, buffers).peak_bytes
        free = self._graphs.free_bytes()
        if needed > free:
            raise CaptureError(
                f"a graph would keep about {needed / 2**30:.3g} GiB for activations, and "
                f"{free / 2**30:.3g} GiB are free"
            )
        try:
            graph = self._graphs.capture(advance, buffers)
            graph.replay()
        except RuntimeError as error:
            raise CaptureError(f"it cannot be captured: {cause(error)}") from error
        for own, value in zip(buffers.outputs, outputs, strict=True):
            off = float((own - value).double().norm())
            if not off <= _TOLERANCE * float(value.double().norm()):
                graph.release()
                raise CaptureError("the graph does not compute what was captured")
        return _Forward(buffers, graph, _filled(written, buffers.outputs), out_spec)


def _kind(leaf: object) -> object:
    """What a graph of an argument depends on.

    Raises:
        CaptureError: It cannot be told from others.
    """
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    try:
        hash(leaf)
    except TypeError as error:
        raise CaptureError(f"an argument is a {type(leaf).__name__}") from error
    return (type(leaf), leaf)


def _filled(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The leaves with other tensors in the places of theirs."""
    new = iter(tensors)
    return [next(new) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

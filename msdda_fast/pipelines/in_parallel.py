# SPDX-License-Identifier: Apache-2.0
"""Pipelines whose objectives run in several processes: what a call has to agree on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from msdda_fast.engine.parallel import ObjectiveParallel, tensor_bytes

__all__ = ["ParallelMethods", "agreed", "agreed_call", "generators_of"]


class ParallelMethods:
    """Mixin of a pipeline whose objectives may run in several processes."""

    _parallel: ObjectiveParallel | None = None

    @property
    def parallel(self) -> ObjectiveParallel | None:
        """The processes that this one samples with; None: it samples alone."""
        return self._parallel

    def enable_parallel(self, parallel: ObjectiveParallel) -> None:
        """Split the objectives of every later call over several processes.

        All processes must hold the same model and make the same calls; each gets the images.
        Several pipelines may use `parallel`, which belongs to the caller.
        """
        self._parallel = parallel

    def disable_parallel(self) -> None:
        """Sample alone again. Every process of the group must do so."""
        self._parallel = None


@contextmanager
def agreed(
    parallel: ObjectiveParallel,
    request: Mapping[str, bytes],
    generators: Sequence[torch.Generator],
) -> Iterator[None]:
    """Begin and end a checked request together on all ranks.

    Generators are set once, here, to the state of rank 0: afterwards they are on every rank in the
    state that one process would leave.

    Args:
        parallel: The ranks.
        request: Everything else that must be the same on every rank, as bytes by name.
        generators: Those that the call draws from.

    Raises:
        RanksDiffer: A rank has a different request; the message says which and where.
        RankLost: See `ObjectiveParallel.generation`.
    """
    kinds = repr([generator.device.type for generator in generators]).encode()
    with parallel.generation({**request, "generators": kinds}):
        for generator in generators:
            generator.set_state(parallel.from_first(generator.get_state()))
        yield


@contextmanager
def agreed_call(
    parallel: ObjectiveParallel,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    device: torch.device,
) -> Iterator[None]:
    """`agreed` for a call of a stock pipeline, of which only the arguments are known.

    Args:
        parallel: The ranks.
        settings: Ours, by what messages call them; `seeds` among them.
        given: All arguments of the call by name. Callbacks are each rank's own.
        device: Where the networks run.

    Raises:
        RanksDiffer, RankLost: See `agreed`.
    """
    own = {name: value for name, value in given.items() if not name.startswith("callback")}
    request = {name: _bytes(value) for name, value in settings.items()}
    generators = []
    if settings["seeds"] is None:
        generators = generators_of(given.get("generator"), device)
    with agreed(parallel, {**request, "arguments of the pipeline": _bytes(own)}, generators):
        yield


def generators_of(given: Any, device: torch.device) -> list[torch.Generator]:  # noqa: ANN401
    """Return what a call draws from: what it was given, one or a list, or torch's default ones.

    Args:
        given: The argument `generator` of the call.
        device: Where the networks run.
    """
    if isinstance(given, torch.Generator):
        return [given]
    if given is not None:
        return list(given)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return [torch.cuda.default_generators[index]]
    return [torch.default_generator]


def _bytes(value: Any) -> bytes:  # noqa: ANN401 - any argument of a call
    """Return bytes that are equal for equal arguments: numbers, texts, tensors, images, nests.

    Of what has no values to compare, such as a callback or a generator, only the kind counts.
    """
    if isinstance(value, Tensor):
        return tensor_bytes(value)
    if value is None or isinstance(value, (str, int, float, torch.dtype, torch.device)):
        return repr(value).encode()
    if isinstance(value, Mapping):
        return b"{%s}" % b", ".join(
            _bytes(key) + b": " + _bytes(entry) for key, entry in value.items()
        )
    if isinstance(value, (list, tuple)):
        return b"[%s]" % b", ".join(map(_bytes, value))
    if callable(pixels := getattr(value, "tobytes", None)):  # of NumPy, and of images
        return repr(getattr(value, "size", None)).encode() + bytes(pixels())
    return type(value).__name__.encode()

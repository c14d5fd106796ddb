# SPDX-License-Identifier: Apache-2.0
"""Whole networks that share no module, evaluated side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.engine.step import Predict, by_objective
from msdda_fast.tracing import is_watched

__all__ = ["SideBySide"]


class SideBySide:
    """Networks on parallel CUDA streams, one after another elsewhere and under a tracer.

    Every network takes the whole input. Outputs are concatenated in the order of the networks, so
    each network evaluates one or more consecutive objectives.

    Args:
        networks: One or more functions as in `Network.kinds` that share no storage they write to.
    """

    def __init__(self, networks: Sequence[Predict]) -> None:
        self._networks = tuple(networks)
        self._streams: list[torch.cuda.Stream] = []

    def __call__(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        """Evaluate all networks at step k; return the outputs (K, B, *S) of their objectives."""
        if next_input.device.type == "cuda" and not is_watched(next_input):
            return self._forked(next_input, k)
        return [
            output for network in self._networks for output in by_objective(network(next_input, k))
        ]

    def _forked(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        first, *others = self._networks
        current = torch.cuda.current_stream(next_input.device)
        if not self._streams:
            self._streams = [torch.cuda.Stream(next_input.device) for _ in others]  # type: ignore[no-untyped-call]
        fork = current.record_event()
        forked: list[Tensor | None] = []
        for stream, network in zip(self._streams, others, strict=True):
            stream.wait_event(fork)
            with torch.cuda.stream(stream):
                forked += by_objective(network(next_input, k))
        outputs = by_objective(first(next_input, k))
        for stream in self._streams:
            current.wait_stream(stream)
        for output in forked:
            if output is not None:
                # freed by `current`, so not to be handed out again by its own stream before that
                output.record_stream(current)
        return [*outputs, *forked]

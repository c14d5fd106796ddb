# SPDX-License-Identifier: Apache-2.0
"""Graphs of one denoiser of a stock pipeline: taken where they can be, dropped when they are stale.

A graph repeats kernels on addresses. So it is dropped when the network has moved, or runs other
code than when it was captured, and never made while something stands in for a module's forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from msdda_fast.adapters.layers import patched
from msdda_fast.adapters.network_state import NetworkState
from msdda_fast.engine.graph import Capture
from msdda_fast.engine.graph_backends import graphs_for
from msdda_fast.engine.network_graphs import NetworkGraphs
from msdda_fast.errors import CaptureError
from msdda_fast.pipelines.stock_forward import is_replaced

__all__ = ["ForwardGraphs"]

logger = logging.getLogger(__name__)


class ForwardGraphs:
    """Runs a network's forward for all objectives, as a graph where `capture` and the device allow.

    Args:
        name: Name of the component in messages.
        network: The component.
        capture: "auto" captures where it can, with a warning where it cannot; "required" raises
            there; "off".
    """

    def __init__(self, name: str, network: nn.Module, capture: Capture) -> None:
        self._name, self._network, self._capture = name, network, capture
        self._graphs: NetworkGraphs | None = None
        self._device: torch.device | None = None
        self._state: NetworkState | None = None
        self._failed = self._ready = False

    def begin(self) -> None:
        """Prepare for a call of the pipeline, in which the network does not change.

        Raises:
            CaptureError: It cannot be captured, and `capture` is "required".
        """
        self._ready = False
        if self._capture == "off" or self._failed or is_replaced(self._network):
            return
        device = next(self._network.parameters()).device
        if device != self._device:
            backend = graphs_for(device)
            self.clear()
            self._graphs = None if backend is None else NetworkGraphs(backend)
            self._device = device
        if self._graphs is None:
            if self._capture == "required":
                raise CaptureError(f"capture='required', but device {device} has no graphs")
            return
        for path, module in self._network.named_modules():
            if (what := patched(module)) is not None:
                self._fail(f"{path or 'the network'} has {what}")
                return
        if self._state is None or not self._state.is_current():
            self.clear()
            self._state = NetworkState(self._network, ())
        self._ready = True

    def run(
        self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:  # noqa: ANN401 - what the network returns
        """Return `forward(*args, **kwargs)`.

        Raises:
            CaptureError: It cannot be captured, and `capture` is "required".
        """
        if self._ready and self._graphs is not None:
            try:
                return self._graphs.run(forward, args, kwargs)
            except CaptureError as error:
                self._fail(str(error))
        return forward(*args, **kwargs)

    def clear(self) -> None:
        """Free the graphs, which read tensors that are no more."""
        if self._graphs is not None:
            self._graphs.clear()

    def _fail(self, reason: str) -> None:
        self._failed, self._ready = True, False
        self.clear()
        if self._capture == "required":
            raise CaptureError(f"capture='required', but {self._name}: {reason}")
        logger.warning(
            "%s (%s) runs without graphs: %s", self._name, type(self._network).__name__, reason
        )

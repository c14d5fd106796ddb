# SPDX-License-Identifier: Apache-2.0
"""The forward that a network has without hooks of ours, and another in its place for a while.

A network may have been compiled, by `torch.compile(network)`, whose forward is the compiled one, or
by `network.compile()`, which compiles what calling the network runs: its forward, whichever it has
then. What stands in for it is never compiled; it runs the compiled code of the network's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from msdda_fast.torch_private import calls_forward, compiled_call

__all__ = ["is_replaced", "replaced", "stock_forward"]


def is_replaced(network: nn.Module) -> bool:
    """Whether another forward stands in, as for a pipeline whose callback is running."""
    return hasattr(network.forward, "unhooked")


def stock_forward(network: nn.Module) -> Callable[..., Any]:
    """Return the network's own forward, compiled if the network is, whatever stands in for it."""
    own: Callable[..., Any] = network.forward
    if is_replaced(network):
        stock: Callable[..., Any] = own.unhooked  # type: ignore[attr-defined]
        return stock
    compiled = compiled_call(network)
    if compiled is None:
        return own
    patched = network.__dict__.get("forward")  # by offloading, for one

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the network's own
        with _forward(network, patched):
            return compiled(*args, **kwargs)

    return call


@contextmanager
def replaced(
    network: nn.Module, forward: Callable[..., Any], stock: Callable[..., Any]
) -> Iterator[None]:
    """Give a network another forward, as offloading does, and its own back afterwards.

    Args:
        network: The network.
        forward: Stands in; gets attributes of `stock`.
        stock: Of `stock_forward`.
    """
    hooked: Any = functools.update_wrapper(forward, stock)
    hooked.unhooked = stock
    with calls_forward(network), _forward(network, hooked):
        yield


@contextmanager
def _forward(network: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Set what the instance has in place of the forward of its class; None: nothing."""
    before = network.__dict__.get("forward")
    _set(network, forward)
    try:
        yield
    finally:
        _set(network, before)


def _set(network: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        network.__dict__.pop("forward", None)
    else:
        network.__dict__["forward"] = forward

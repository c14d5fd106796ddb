# SPDX-License-Identifier: Apache-2.0
"""One call at a time: threads that use the same networks wait for each other.

A call switches adapters and writes static buffers, so two at once would mix their images. Who uses
a network stands here and in nobody's attributes: several pipelines may share it, and pipelines stay
copyable.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from msdda_fast.adapters.layers import uncompiled
from msdda_fast.errors import PipelineBusy

__all__ = ["exclusively", "is_mine", "one_at_a_time"]

Call = TypeVar("Call", bound=Callable[..., Any])

_changed = threading.Condition()
#: The thread that uses a network, and how many calls within calls of it do.
_users: MutableMapping[nn.Module, tuple[int, int]] = WeakKeyDictionary()
#: What threads wait for.
_wanted: dict[int, set[nn.Module]] = {}


class _Calls(threading.local):
    """Pipelines whose calls a thread is in."""

    def __init__(self) -> None:
        self.pipes: list[object] = []


_calls = _Calls()


class Exclusive(Protocol):
    """A pipeline whose calls exclude each other."""

    def shared_networks(self) -> Iterable[nn.Module | None]:
        """The networks that a call switches or writes for."""


@contextmanager
def exclusively(networks: Iterable[Any]) -> Iterator[None]:
    """Wait until no other thread uses any of the networks, and keep others waiting meanwhile.

    Raises:
        PipelineBusy: A thread that uses one of them waits for what this thread uses, as two
            callbacks can that call each other's pipeline.
    """
    modules, me = _modules(networks), threading.get_ident()
    with _changed:
        while _others(modules, me):
            if _waits_for(modules, me):
                raise PipelineBusy(
                    "a callback called a pipeline that another thread is in, whose own callback "
                    "waits for this one: use copies of the networks"
                )
            _wanted[me] = modules
            try:
                _changed.wait()
            finally:
                del _wanted[me]
        for module in modules:
            _users[module] = (me, _users.get(module, (me, 0))[1] + 1)
    try:
        yield
    finally:
        with _changed:
            for module in modules:
                _, depth = _users.pop(module)
                if depth > 1:
                    _users[module] = (me, depth - 1)
            _changed.notify_all()


def is_mine(networks: Iterable[Any]) -> bool:
    """Return whether this thread uses one of the networks, so that whoever waits for it waits."""
    me = threading.get_ident()
    with _changed:
        return any(_users.get(module, (None, 0))[0] == me for module in _modules(networks))


def one_at_a_time(call: Call) -> Call:
    """Make calls from several threads wait for each other.

    The call raises `PipelineBusy` inside itself: a callback would overwrite what it looks at.
    """

    @wraps(call)
    def alone(self: Exclusive, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the call
        with exclusively(self.shared_networks()):
            if any(pipe is self for pipe in _calls.pipes):
                raise PipelineBusy(
                    "a callback called the pipeline that calls it: use another one of the same "
                    "networks, from_pipe(pipe)"
                )
            _calls.pipes.append(self)
            try:
                # a tensor made in inference mode could not be written to by a later call outside
                with torch.inference_mode(False), torch.no_grad():
                    return call(self, *args, **kwargs)
            finally:
                _calls.pipes.pop()

    return cast(Call, alone)


def _modules(networks: Iterable[Any]) -> set[nn.Module]:
    return {uncompiled(network) for network in networks if isinstance(network, nn.Module)}


def _others(modules: Collection[nn.Module], me: int) -> set[int]:
    """Return the other threads that use some of the modules."""
    return {_users[module][0] for module in modules if module in _users} - {me}


def _waits_for(modules: Collection[nn.Module], me: int) -> bool:
    """Return whether a thread that uses some of the modules waits, through others too, for `me`."""
    seen: set[int] = set()
    following = list(modules)
    while following:
        user, _ = _users.get(following.pop(), (me, 0))
        if user not in seen | {me}:
            seen.add(user)
            wanted = _wanted.get(user, set())
            if any(_users.get(module, (None, 0))[0] == me for module in wanted):
                return True
            following += wanted
    return False


def _forget_other_threads() -> None:
    """Free what other threads used, in a forked child: they are not there to end their calls."""
    global _changed
    _changed = threading.Condition()
    _wanted.clear()
    me = threading.get_ident()
    for module in [module for module, (user, _) in _users.items() if user != me]:
        del _users[module]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)

# SPDX-License-Identifier: Apache-2.0
"""One call at a time: threads that use the same networks wait for each other.

A call switches adapters and writes static buffers, so two at once would mix their images. Locks
belong to networks, which several pipelines may share, and are held by nobody's attributes:
pipelines stay copyable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import count
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from msdda_fast.adapters.layers import uncompiled
from msdda_fast.errors import PipelineBusy

__all__ = ["exclusively", "one_at_a_time"]

Call = TypeVar("Call", bound=Callable[..., Any])

_numbers = count()
_locks: MutableMapping[nn.Module, tuple[int, Any]] = WeakKeyDictionary()
_new_lock = threading.Lock()


class Exclusive(Protocol):
    """A pipeline whose calls exclude each other."""

    _is_called: bool

    def shared_networks(self) -> Iterable[nn.Module | None]:
        """The networks that a call switches or writes for."""


@contextmanager
def exclusively(networks: Iterable[Any]) -> Iterator[None]:
    """Wait until no other thread uses any of the networks, and keep others waiting meanwhile."""
    modules = {uncompiled(network) for network in networks if isinstance(network, nn.Module)}
    with _new_lock:
        found = [
            _locks.setdefault(module, (next(_numbers), threading.RLock())) for module in modules
        ]
    with ExitStack() as stack:
        for _, lock in sorted(found, key=lambda entry: entry[0]):  # all in one order: no deadlock
            stack.enter_context(lock)
        yield


def one_at_a_time(call: Call) -> Call:
    """Make calls from several threads wait for each other.

    The call raises `PipelineBusy` inside itself: a callback would overwrite what it looks at.
    """

    @wraps(call)
    def alone(self: Exclusive, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the call
        with exclusively(self.shared_networks()):
            if self._is_called:
                raise PipelineBusy(
                    "a callback called the pipeline that calls it: use another one of the same "
                    "networks, from_pipe(pipe)"
                )
            self._is_called = True
            try:
                return call(self, *args, **kwargs)
            finally:
                self._is_called = False

    return cast(Call, alone)

# SPDX-License-Identifier: Apache-2.0
"""Operators of torch.library, as which a compiler or tracer sees the raw functions.

A call through the dispatcher costs tens of microseconds, so eager code calls backends directly. The
operators write into tensors that the caller allocated, which functionalisation turns into values.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["as_tensor", "register_in_place"]

_LIBRARY = torch.library.Library("msdda_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_in_place(name: str, arguments: str, run: Callable[..., None]) -> None:
    """Define `msdda_fast::<name>(<arguments>) -> ()`; its fake kernel does nothing."""
    _LIBRARY.define(f"{name}({arguments}) -> ()")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"msdda_fast::{name}", _write_nothing, lib=_LIBRARY)


def _write_nothing(*arguments: object) -> None: ...


def as_tensor(step: int | Tensor, like: Tensor) -> Tensor:
    """Return a step index as operators take it: 0-d int64 on the device of `like`."""
    if isinstance(step, Tensor):
        return step
    return torch.full((), step, dtype=torch.int64, device=like.device)

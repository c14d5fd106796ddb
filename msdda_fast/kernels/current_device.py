# SPDX-License-Identifier: Apache-2.0
"""The device that a launch goes to: Triton takes the current one, whatever its tensors are on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["on_its_device"]

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(run: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Make the GPU of the first argument the current one while `run` launches kernels.

    The native CUDA kernels do the same in C++ (`DeviceGuard`), since their runtime is a copy of its
    own.
    """

    @functools.wraps(run)
    def guarded(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        index = tensor.device.index if tensor.is_cuda else None
        if index is None or index == torch.cuda.current_device():
            return run(tensor, *args, **kwargs)
        with torch.cuda.device(index):
            return run(tensor, *args, **kwargs)

    return cast("Callable[Concatenate[Tensor, P], R]", guarded)

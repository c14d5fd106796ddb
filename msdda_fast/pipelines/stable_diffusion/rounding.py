# SPDX-License-Identifier: Apache-2.0
"""Products of bfloat16 numbers in float32, for processors that are slow at them.

Kernels in bfloat16 multiply exactly, add in float32 and round what they write. So the same product
of the widened numbers, rounded, is what they return, up to the order of a sum; and where there is
no hardware for bfloat16 it takes a fiftieth of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdda_fast.torch_private import TorchDispatchMode, tree_leaves, tree_map

__all__ = ["WideProducts"]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear")  #: And all of attention.


class WideProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs products of bfloat16 tensors, convolutions and attention in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an overload of an operator
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        name = str(func).split(".")[1]
        narrow = any(is_narrow(value) for value in tree_leaves((args, kwargs)))
        if not narrow or not (name in PRODUCTS or "attention" in name):
            return func(*args, **kwargs)
        wide, given = tree_map(_widened, (args, kwargs))
        return tree_map(_rounded, func(*wide, **given))


def is_narrow(value: object) -> bool:
    """Whether it is a tensor of bfloat16."""
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _widened(value: Any) -> object:  # noqa: ANN401 - any argument of an operator
    return value.float() if is_narrow(value) else value


def _rounded(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.bfloat16()
    return value

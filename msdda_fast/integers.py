# SPDX-License-Identifier: Apache-2.0
"""Integers as Python, numpy and torch write them."""

from __future__ import annotations

import operator
from typing import SupportsIndex, cast

from torch import Tensor

__all__ = ["as_integer"]


def as_integer(value: object) -> int | None:
    """Return one integer as an `int`, and None for anything else.

    Accepts what `range` accepts, so numpy's integers too, and a 0-d tensor of an integer dtype. A
    bool is no integer here, nor is a list or array of one.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor):
        item = value.item() if value.ndim == 0 else None
        return int(item) if type(item) is int else None
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        return None

# SPDX-License-Identifier: Apache-2.0
"""The numbers that bound an engine, checked once."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from msdda_fast.errors import InvalidRequest

__all__ = ["Limits", "duration", "integer"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Arguments of `Engine` of the same names, with defaults filled in."""

    _: KW_ONLY
    max_batch: int
    max_wait_ms: float
    queue_limit: int
    client_limit: int
    max_pixels: int
    max_cost: int
    batch_sizes: tuple[int, ...]

    @classmethod
    def check(
        cls,
        *,
        max_wait_ms: float,
        client_limit: int | None,
        batch_sizes: Sequence[int] | None,
        **counts: int,
    ) -> Limits:
        """Check arguments of `Engine`.

        Raises:
            ValueError: A number is out of range.
        """
        counts = {name: integer(name, count) for name, count in counts.items()}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if duration("max_wait_ms", max_wait_ms) == math.inf:
            raise ValueError("max_wait_ms must be at least 0 and finite, got infinity")
        limit = counts["queue_limit"]
        own = (limit + 1) // 2 if client_limit is None else integer("client_limit", client_limit)
        if not 1 <= own <= limit:
            raise ValueError(f"client_limit must be from 1 to queue_limit={limit}, got {own}")
        if batch_sizes is not None:
            if isinstance(batch_sizes, str) or not isinstance(batch_sizes, Sequence):
                raise InvalidRequest(f"batch_sizes must be a list, got {batch_sizes!r}")
            batch_sizes = [integer("batch_sizes", size) for size in batch_sizes]
        sizes = _sizes(counts["max_batch"], batch_sizes)
        return cls(max_wait_ms=max_wait_ms, client_limit=own, batch_sizes=sizes, **counts)


def integer(name: str, number: object) -> int:
    """Return an integer of any type, such as NumPy's, as an int.

    Raises:
        InvalidRequest: It is none.
    """
    try:
        if isinstance(number, bool):
            raise TypeError
        return operator.index(number)  # type: ignore[arg-type]  # which is what this finds out
    except TypeError:
        raise InvalidRequest(f"{name} must be an integer, got {number!r}") from None


def duration(name: str, number: float) -> float:
    """Return a time, in any unit.

    Raises:
        ValueError: It is no number, or below 0.
    """
    try:
        time = math.nan if isinstance(number, str) else float(number)
    except (OverflowError, TypeError, ValueError):
        time = math.nan
    if not time >= 0:
        raise ValueError(f"{name} must be at least 0 and a number, got {number!r}")
    return time


def _sizes(max_batch: int, sizes: Sequence[int] | None) -> tuple[int, ...]:
    if sizes is None:
        powers = (2**i for i in range(max_batch.bit_length()))
        return tuple(sorted({*powers, max_batch}))
    if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1 or sizes[-1] != max_batch:
        raise ValueError(f"batch_sizes must increase up to max_batch={max_batch}, got {sizes}")
    return tuple(sizes)

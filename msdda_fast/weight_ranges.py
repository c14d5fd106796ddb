# SPDX-License-Identifier: Apache-2.0
"""Preferences that hold in a range of timesteps: `{(500, 999): {...}, (0, 499): {...}}`.

Both ends are included. Ranges may share an end, which belongs to the higher one; else they do not
overlap. Together they cover every timestep of the schedule. In text a range is "500-999".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from msdda_fast.errors import InvalidWeights

__all__ = ["alternatives", "by_timestep", "has_ranges"]

_NUMBER = r"\d+(?:\.\d+)?"
_TEXT = re.compile(rf"\s*({_NUMBER})\s*-\s*({_NUMBER})\s*")


def has_ranges(weights: object, names: Sequence[str] | None = None) -> bool:
    """Return whether preferences are by ranges of timesteps, for all images or for some.

    Args:
        weights: What an entry point got.
        names: Of the objectives, which are no ranges, whatever they look like.
    """
    if isinstance(weights, (list, tuple)):
        return any(_is_mapping_of_ranges(entry, names) for entry in weights)
    return _is_mapping_of_ranges(weights, names)


def by_timestep(
    weights: Any,  # noqa: ANN401 - for which `has_ranges`
    timesteps: Sequence[float] | Tensor,
    names: Sequence[str] | None = None,
) -> Callable[[int], Any]:
    """Return the same preferences as a callable from the step k to what holds in it.

    Args:
        weights: A mapping from ranges to preferences, or a list in which some are.
        timesteps: (T,), in sampling order, on the training grid.
        names: Of the objectives.

    Raises:
        InvalidWeights: A range is not (first, last) with 0 <= first <= last, ranges overlap, or
            none holds a timestep.
    """
    values = [float(t) for t in timesteps]
    if isinstance(weights, (list, tuple)):
        entries = [_at_each(entry, values, names) for entry in weights]
        return lambda k: [entry[k] for entry in entries]
    chosen = _at_each(weights, values, names)
    return lambda k: chosen[k]


def alternatives(weights: Any, names: Sequence[str] | None = None) -> list[Any]:  # noqa: ANN401
    """Return preferences without ranges that together contain every one that `weights` holds.

    Raises:
        InvalidWeights: As `by_timestep`, timesteps aside.
    """
    entries = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    kept = [
        [preference for _, _, preference in _sorted(entry)]
        if _is_mapping_of_ranges(entry, names)
        else [entry]
        for entry in entries
    ]
    most = max(map(len, kept))
    forms = [[options[i % len(options)] for options in kept] for i in range(most)]
    return forms if isinstance(weights, (list, tuple)) else [form[0] for form in forms]


def _is_mapping_of_ranges(entry: object, names: Sequence[str] | None) -> bool:
    if not isinstance(entry, Mapping):
        return False
    known = set(names or ())
    return any(_looks_like_a_range(key) and key not in known for key in entry)


def _looks_like_a_range(key: object) -> bool:
    return isinstance(key, tuple) or (isinstance(key, str) and _TEXT.fullmatch(key) is not None)


def _at_each(entry: Any, timesteps: list[float], names: Sequence[str] | None) -> list[Any]:  # noqa: ANN401
    """The preferences of every timestep."""
    if not _is_mapping_of_ranges(entry, names):
        return [entry] * len(timesteps)
    ranges = _sorted(entry)
    found = []
    for t in timesteps:
        for first, last, preference in ranges:
            if first <= t <= last:
                found.append(preference)
                break
        else:
            known = ", ".join(f"{first:g}-{last:g}" for first, last, _ in ranges)
            raise InvalidWeights(
                f"weights by ranges of timesteps must cover every timestep that is sampled: {t:g} "
                f"is in none of {known}"
            )
    return found


def _sorted(entry: Mapping[Any, Any]) -> list[tuple[float, float, Any]]:
    """(first, last, preference), from the highest range on."""
    ranges = sorted(
        ((*_range(key), preference) for key, preference in entry.items()),
        key=lambda item: item[:2],
        reverse=True,
    )
    for (first, last, _), (lower, upper, _) in pairwise(ranges):
        if upper > first or (lower, upper) == (first, last):
            raise InvalidWeights(
                f"weights by ranges of timesteps overlap: {lower:g}-{upper:g} and "
                f"{first:g}-{last:g}"
            )
    return ranges


def _range(key: object) -> tuple[float, float]:
    """(first, last) of a key, which may be text."""
    given: Any = key
    if isinstance(key, str):
        match = _TEXT.fullmatch(key)
        given = None if match is None else match.groups()
    try:
        first, last = (float(value) for value in given)
    except (TypeError, ValueError):
        first, last = 1.0, 0.0
    if not 0 <= first <= last < float("inf"):
        raise InvalidWeights(
            f"weights by ranges of timesteps need keys (first, last) with 0 <= first <= last, such "
            f'as (500, 999) or "500-999", got {key!r:.80}'
        )
    return first, last

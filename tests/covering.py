# SPDX-License-Identifier: Apache-2.0
"""Covering arrays: few rows of a sweep that still meet every pair of its values.

A sweep over dtypes, layouts, shapes and backends has a row for every combination, though a fault
that needs three of them at once is rare; what takes two is met by any rows in which every two
values of different parameters stand side by side. `make test` runs such rows, `make test-all` all.

    @pytest.mark.sweep          # rows that cover all pairs
    @pytest.mark.sweep(1)       # rows that cover all values, where each row takes seconds
    @pytest.mark.sweep(seed=8)  # all pairs of the first 8 values of `seed`: for random cases
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations, groupby
from typing import Any

import pytest

__all__ = ["covering", "mark_rest"]


def covering(rows: Sequence[Mapping[str, Hashable]], strength: int = 2) -> list[int]:
    """Indices of rows in which every pair of values that stands in some row stands, too.

    Greedy and deterministic: always the row with the most new pairs, the first of several. Rows of
    one parameter are all needed.

    Args:
        rows: Values by parameter.
        strength: 2 for pairs, 1 for single values.
    """
    pairs = [set(combinations(row.items(), min(strength, len(row)))) for row in rows]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(pairs[index] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def mark_rest(items: Sequence[pytest.Item]) -> None:
    """Mark as `full` the rows of each test with the marker `sweep` that no pair needs.

    Rows that are skipped cover nothing. A marker of a class may name what not all its tests have.
    """
    for _, group in groupby(items, key=lambda item: item.nodeid.partition("[")[0]):
        rows = list(group)
        sweep = rows[0].get_closest_marker("sweep")
        if sweep is None or not hasattr(rows[0], "callspec"):
            continue
        counts = {name: n for name, n in sweep.kwargs.items() if name in _values(rows[0])}
        first = {name: _first(rows, name, count) for name, count in counts.items()}
        runs = [
            item
            for item in rows
            if item.get_closest_marker("skip") is None
            and all(_values(item)[name] in known for name, known in first.items())
        ]
        chosen = {
            id(runs[index]) for index in covering([_values(item) for item in runs], *sweep.args)
        }
        for item in rows:
            if id(item) not in chosen:
                item.add_marker(pytest.mark.full)


def _values(item: Any) -> dict[str, str]:
    """Parameters of a test, those of its fixtures included; tensors have no hash, but a text."""
    return {name: repr(value) for name, value in item.callspec.params.items()}


def _first(rows: Sequence[pytest.Item], name: str, count: int) -> set[str]:
    return set(list(dict.fromkeys(_values(item)[name] for item in rows))[:count])

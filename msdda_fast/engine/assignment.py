# SPDX-License-Identifier: Apache-2.0
"""Which rank evaluates which objectives in a step: pure arithmetic, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Work", "assign"]


class Work(NamedTuple):
    """Guidance branches [start, stop) of some objectives, to be evaluated in one forward."""

    objectives: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Pairs (objective, branch), in the order in which their outputs are gathered."""
        return [(m, k) for m in self.objectives for k in range(self.start, self.stop)]


def assign(
    active: Sequence[bool], branches: int, size: int, *, split_guidance: bool
) -> list[list[Work]]:
    """Distribute the active objectives of one step over the ranks, evenly and in order.

    Args:
        active: M flags, at least one set.
        branches: K, 2 with guidance and 1 without.
        size: W, the number of ranks.
        split_guidance: Put the branches of an objective on different ranks where that leaves the
            busiest rank less to do.

    Returns: W lists; those of the last ranks are empty when there are more ranks than work.
    """
    objectives = [m for m, is_active in enumerate(active) if is_active]
    units = [(m, 0, branches) for m in objectives]
    halves = [(m, k, k + 1) for m in objectives for k in range(branches)]
    if split_guidance and -(-len(halves) // size) < -(-len(units) // size) * branches:
        units = halves
    shares = []
    for rank in range(size):
        # the first `more` ranks have one unit more
        each, more = divmod(len(units), size)
        begin = rank * each + min(rank, more)
        shares.append(_merged(units[begin : begin + each + (rank < more)]))
    return shares


def _merged(units: Sequence[tuple[int, int, int]]) -> list[Work]:
    """Join the branches of each objective, then the objectives with the same branches."""
    spans: dict[int, tuple[int, int]] = {}
    for m, start, stop in units:
        spans[m] = (spans.get(m, (start, stop))[0], stop)
    groups: dict[tuple[int, int], list[int]] = {}
    for m, span in spans.items():
        groups.setdefault(span, []).append(m)
    return [Work(tuple(members), *span) for span, members in groups.items()]

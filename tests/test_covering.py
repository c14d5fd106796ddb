# SPDX-License-Identifier: Apache-2.0
"""A thinned sweep meets every pair of values that the whole sweep meets."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest

from tests.covering import covering, mark_rest

SWEEP = {"dtype": range(4), "layout": range(5), "shape": range(7), "backend": range(3)}


def all_rows(axes):
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def pairs_of(rows):
    return {pair for row in rows for pair in combinations(row.items(), 2)}


@pytest.mark.parametrize("ragged", [False, True])
def test_every_pair_stays_and_most_rows_go(ragged):
    rows = all_rows(SWEEP)
    if ragged:
        rows = [row for row in rows if (row["dtype"] + row["shape"]) % 3]
    chosen = [rows[index] for index in covering(rows)]
    assert pairs_of(chosen) == pairs_of(rows)
    assert len(chosen) <= 2 * 5 * 7 < len(rows) / 3  # of the two longest axes, 35 pairs


def test_the_rows_are_always_the_same_and_in_order():
    rows = all_rows(SWEEP)
    assert covering(rows) == covering(rows) == sorted(covering(rows))


def test_single_values_take_as_many_rows_as_the_longest_axis():
    rows = all_rows(SWEEP)
    chosen = [rows[index] for index in covering(rows, 1)]
    assert {value for row in chosen for value in row.items()} == {
        value for row in rows for value in row.items()
    }
    assert len(chosen) == 7


def test_rows_of_one_parameter_are_all_needed():
    assert covering([{"only": n} for n in range(3)]) == [0, 1, 2]
    assert covering([]) == []


class Item:
    def __init__(self, name, params, *markers):
        self.nodeid = f"tests/x.py::{name}[{params}]"
        self.callspec = SimpleNamespace(params=params)
        self.markers = {marker.name: marker for marker in markers}

    def get_closest_marker(self, name):
        return self.markers.get(name)

    def add_marker(self, marker):
        self.markers[marker.name] = marker

    @property
    def is_quick(self):
        return "full" not in self.markers and "skip" not in self.markers


def test_only_sweeps_are_thinned():
    items = [Item("test_a", row) for row in all_rows(SWEEP)]
    mark_rest(items)
    assert all(item.is_quick for item in items)


def test_rows_that_are_skipped_cover_nothing():
    rows = all_rows({"a": range(3), "b": range(3), "c": range(3)})
    sweep, skip = pytest.mark.sweep.mark, pytest.mark.skip.mark
    items = [Item("test_a", row, sweep, *([skip] if row["a"] == row["b"] else [])) for row in rows]
    mark_rest(items)
    quick = [item.callspec.params for item in items if item.is_quick]
    assert pairs_of(quick) == pairs_of(row for row in rows if row["a"] != row["b"])
    assert len(quick) < len([row for row in rows if row["a"] != row["b"]])


def test_random_cases_are_cut_to_the_first_ones():
    rows = all_rows({"seed": range(20), "host": ["wide", "narrow"]})
    items = [Item("test_a", row, pytest.mark.sweep(seed=3).mark) for row in rows]
    mark_rest(items)
    assert [item.callspec.params["seed"] for item in items if item.is_quick] == [0, 0, 1, 1, 2, 2]

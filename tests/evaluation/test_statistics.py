# SPDX-License-Identifier: Apache-2.0
"""Intervals have the width that theory gives, differences are paired, hypervolumes are areas."""

import numpy as np
import pytest

from msdda_fast.evaluation.scores import COSTS, Score
from msdda_fast.evaluation.statistics import (
    arms_of,
    hypervolume,
    hypervolume_gain,
    mean_reward,
    paired_gain,
)

RNG = np.random.default_rng(7)
PAIRS = [(f"prompt {p}", seed) for p in range(10) for seed in range(20)]


def rows(method: str, w: float | None, r1, r2, pairs=PAIRS, seconds=1.0) -> list[Score]:
    weights = "" if w is None else f"r1={w:g} r2={1 - w:g}"
    costs = dict.fromkeys(COSTS, 2.0)
    return [
        Score(method, "", w, weights, 50, prompt, seed, {"r1": a, "r2": b}, seconds, costs)
        for (prompt, seed), a, b in zip(pairs, r1, r2, strict=True)
    ]


def draw(mean: float, sd: float = 1.0, count: int = len(PAIRS)):
    return RNG.normal(mean, sd, count)


def test_an_interval_is_two_standard_errors_each_way():
    values = draw(3.0)
    found = mean_reward(values)
    error = values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.25 * error
    )
    assert found.pairs == len(PAIRS) and found.excludes_zero


def test_intervals_cover_the_truth_as_often_as_they_say():
    found = [mean_reward(draw(0.0, count=60)) for _ in range(200)]
    covered = sum(not interval.excludes_zero for interval in found)
    assert 180 <= covered <= 199  # 95% of 200, two standard errors of 3


def test_noise_that_both_sides_share_leaves_a_paired_difference():
    shared = draw(0.0, 5.0)
    arms = arms_of(
        rows("A", 0.5, shared + 0.1, shared) + rows("B", 0.5, shared, shared + draw(0, 0.01))
    )
    found = paired_gain(arms[0], arms[1], {"r1": 0.5, "r2": 0.5})
    assert found.mean == pytest.approx(0.05, abs=0.01) and found.excludes_zero
    unpaired = mean_reward(arms[0].values("r1") - arms[1].values("r1")[::-1])
    assert not unpaired.excludes_zero


def test_only_pairs_of_both_count():
    r = draw(1.0)
    arms = arms_of(rows("A", 0.2, r, r) + rows("B", 0.2, r[:50] - 1, r[:50], PAIRS[:50]))
    found = paired_gain(arms[0], arms[1], {"r1": 1.0, "r2": 0.0})
    assert found == pytest.approx((1.0, 1.0, 1.0, 50))
    apart = arms_of(rows("C", 0.2, [1.0], [1.0], [("elsewhere", 0)]))
    with pytest.raises(ValueError, match=r"no \(prompt, seed\) is shared by A w=0.2, C w=0.2"):
        paired_gain(arms[0], apart[0], {"r1": 1.0})


def test_hypervolume_is_the_area_of_the_staircase():
    means = {0.2: (1.0, 3.0), 0.5: (2.0, 2.0), 0.8: (3.0, 1.0), 0.9: (0.5, 0.5)}
    ones = np.ones(len(PAIRS))
    scores = [row for w, (a, b) in means.items() for row in rows("A", w, a * ones, b * ones)]
    found = hypervolume(arms_of(scores), {"r1": 0.0, "r2": 0.0})
    assert found == pytest.approx((6.0, 6.0, 6.0, len(PAIRS)))  # 3 + 2 + 1; the last is dominated
    above = hypervolume(arms_of(scores), {"r1": 1.0, "r2": 1.0})
    assert above.mean == pytest.approx(1.0)


def test_hypervolume_gain_is_paired_too():
    noise = draw(0.0, 3.0)
    better = rows("A", 0.5, noise + 5.2, noise + 5.0)
    worse = rows("B", 0.5, noise + 5.0, noise + 5.0)
    reference = {"r1": 0.0, "r2": 0.0}
    ours, theirs = (arms_of(r) for r in (better, worse))
    gain = hypervolume_gain(ours, theirs, reference)
    assert gain.mean == pytest.approx(0.2 * (noise.mean() + 5.0)) and gain.excludes_zero
    one, other = hypervolume(ours, reference), hypervolume(theirs, reference)
    assert one.low < other.high  # their own intervals overlap widely


def test_arms_keep_what_tables_need():
    r = draw(0.0)
    arms = arms_of(rows("SD", None, r, r, seconds=3.0) + rows("A", 0.2, r, r))
    assert [(arm.method, arm.w) for arm in arms] == [("SD", None), ("A", 0.2)]
    assert arms[0].seconds == 3.0 and arms[0].costs["decodes"] == 2.0 and arms[0].weights == {}
    assert arms[1].weights == {"r1": 0.2, "r2": 0.8}

# SPDX-License-Identifier: Apache-2.0
"""Means, 95% intervals, paired differences and hypervolumes of scored images.

Intervals are percentile bootstraps over (prompt, seed) pairs. Systems that are compared are
resampled together, on the pairs that both have: equal (prompt, seed) start from equal noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import moocore
import numpy as np
from numpy.typing import NDArray

from msdda_fast.evaluation.scores import COSTS, Score

__all__ = [
    "Arm",
    "Interval",
    "arms_of",
    "hypervolume",
    "hypervolume_gain",
    "mean_reward",
    "paired_gain",
]

Values: TypeAlias = NDArray[np.float64]
Pair: TypeAlias = tuple[str, int]  # prompt, seed

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with its 95% bootstrap interval, and the number of pairs it is taken over."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Arm:
    """The images of one system at one preference.

    Attributes:
        method, variant, w: As in the scores.
        weights: By reward; empty for a system without weights.
        rewards: For each pair, the values by reward.
        seconds: Per image, in the fastest batch; the others share the machine with other work.
        costs: Mean per image, by the names of `COSTS`.
    """

    method: str
    variant: str
    w: float | None
    weights: Mapping[str, float]
    rewards: Mapping[Pair, Mapping[str, float]]
    seconds: float
    costs: Mapping[str, float]

    @property
    def system(self) -> tuple[str, str]:
        """Method and variant."""
        return self.method, self.variant

    def values(self, reward: str, pairs: Sequence[Pair] | None = None) -> Values:
        """Return one reward of the given pairs, or of all, in their order."""
        return np.array([self.rewards[pair][reward] for pair in pairs or list(self.rewards)])

    def scalarised(
        self, weights: Mapping[str, float], pairs: Sequence[Pair] | None = None
    ) -> Values:
        """Return r_w = sum_j w_j r_j of the given pairs, or of all, in their order."""
        total: Values = np.sum(
            [w * self.values(name, pairs) for name, w in weights.items()], axis=0
        )
        return total


def arms_of(rows: Iterable[Score]) -> list[Arm]:
    """Group scores by system and preference, in order of appearance."""
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for row in rows:
        groups.setdefault((row.method, row.variant, row.weights), []).append(row)
    return [_arm(group) for group in groups.values()]


def mean_reward(values: Values) -> Interval:
    """Return the mean of one value per pair, (n,), with its interval."""
    means = values @ _resampled(len(values))
    return _interval(float(values.mean()), means, len(values))


def paired_gain(ours: Arm, theirs: Arm, weights: Mapping[str, float]) -> Interval:
    """Return the mean of r_w of `ours` minus that of `theirs`, over the pairs that both have.

    Raises:
        ValueError: They have no pair in common.
    """
    pairs = _common([ours, theirs])
    return mean_reward(ours.scalarised(weights, pairs) - theirs.scalarised(weights, pairs))


def hypervolume(front: Sequence[Arm], reference: Mapping[str, float]) -> Interval:
    """Return the volume above a reference point that the mean rewards of the arms dominate.

    Args:
        front: One arm per preference; means are over the pairs that all arms have.
        reference: By reward; an arm whose mean is below it in any reward adds nothing.

    Raises:
        ValueError: The arms have no pair in common.
    """
    pairs = _common(front)
    volumes = _volumes(front, reference, pairs)
    return _interval(volumes[0], np.array(volumes[1:]), len(pairs))


def hypervolume_gain(
    ours: Sequence[Arm], theirs: Sequence[Arm], reference: Mapping[str, float]
) -> Interval:
    """Return `hypervolume` of `ours` minus that of `theirs`, over the pairs that all arms have."""
    pairs = _common([*ours, *theirs])
    gains = np.subtract(_volumes(ours, reference, pairs), _volumes(theirs, reference, pairs))
    return _interval(float(gains[0]), gains[1:], len(pairs))


def _arm(group: Sequence[Score]) -> Arm:
    first = group[0]
    weights = dict(item.split("=") for item in first.weights.split())
    return Arm(
        method=first.method,
        variant=first.variant,
        w=first.w,
        weights={name: float(value) for name, value in weights.items()},
        rewards={(row.prompt, row.seed): row.rewards for row in group},
        seconds=min(row.seconds for row in group),
        costs={name: float(np.mean([row.costs[name] for row in group])) for name in COSTS},
    )


def _common(arms: Sequence[Arm]) -> list[Pair]:
    shared = set(arms[0].rewards).intersection(*(arm.rewards for arm in arms))
    if not shared:
        names = ", ".join(" ".join(filter(None, (*arm.system, f"w={arm.w}"))) for arm in arms)
        raise ValueError(f"no (prompt, seed) is shared by {names}")
    return sorted(shared)


@lru_cache(maxsize=8)
def _resampled(count: int) -> Values:
    """Return weights (n, R) of n values in R resamples; the same for equal n, so pairs match."""
    rng = np.random.default_rng(0)
    draws: Values = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).T / count
    return draws


def _volumes(
    front: Sequence[Arm], reference: Mapping[str, float], pairs: Sequence[Pair]
) -> list[float]:
    """Return the hypervolume of the means, then of the means of every resample."""
    weights = np.column_stack([np.full(len(pairs), 1 / len(pairs)), _resampled(len(pairs))])
    values = np.array([[arm.values(name, pairs) for name in reference] for arm in front])
    means = values @ weights  # (arms, rewards, 1 + R)
    point = list(reference.values())
    return [
        float(moocore.hypervolume(means[..., r], ref=point, maximise=True))
        for r in range(means.shape[-1])
    ]


def _interval(mean: float, resamples: Values, count: int) -> Interval:
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Interval(mean, float(low), float(high), count)

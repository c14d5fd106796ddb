# SPDX-License-Identifier: Apache-2.0
"""The numbers in the tables of a comparison: rewards at each preference, and hypervolumes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msdda_fast.evaluation.statistics import (
    Arm,
    Interval,
    hypervolume,
    hypervolume_gain,
    mean_reward,
    paired_gain,
)

__all__ = [
    "OURS",
    "Front",
    "PreferenceTable",
    "Row",
    "front_table",
    "preference_table",
    "to_csv",
    "to_markdown",
]

#: Method and variant that all others are compared with.
OURS = ("MSDDA", "")


@dataclass(frozen=True, slots=True)
class Row:
    """One system at one preference.

    Attributes:
        arm: The images.
        rewards: Means by reward: those with a weight, then those that all images have.
        scalarised: Mean of r_w.
        gain: Mean of r_w of MSDDA minus this system, paired; None: this is MSDDA.
    """

    arm: Arm
    rewards: Mapping[str, Interval]
    scalarised: Interval
    gain: Interval | None

    @property
    def verdict(self) -> str:
        """What the paired difference shows."""
        return _verdict(self.gain)


@dataclass(frozen=True, slots=True)
class PreferenceTable:
    """All systems at one preference, sorted by their paired difference to MSDDA, best first."""

    weights: Mapping[str, float]
    rows: Sequence[Row]

    @property
    def judged(self) -> list[str]:
        """The rewards of the table that have no weight."""
        return [name for name in self.rows[0].rewards if name not in self.weights]


@dataclass(frozen=True, slots=True)
class Front:
    """One system over several preferences.

    Attributes:
        system: Method and variant.
        volume: Hypervolume of its mean rewards.
        gain: Hypervolume of MSDDA minus this one, paired; None: this is MSDDA.
        unet_forwards: Mean number per image.
    """

    system: tuple[str, str]
    volume: Interval
    gain: Interval | None
    unet_forwards: float

    @property
    def verdict(self) -> str:
        """What the paired difference shows."""
        return _verdict(self.gain)


def preference_table(arms: Sequence[Arm], weights: Mapping[str, float]) -> PreferenceTable:
    """Compare the arms at one preference, and those without weights.

    Raises:
        ValueError: There is no arm of MSDDA, or it shares no (prompt, seed) with another arm.
    """
    chosen = [arm for arm in arms if not arm.weights or _at(arm, weights)]
    ours = next((arm for arm in chosen if arm.system == OURS and arm.weights), None)
    if ours is None:
        raise ValueError(f"no MSDDA at {dict(weights)} in the scores: nothing to compare with")
    judged = [
        name
        for name in next(iter(ours.rewards.values()))
        if name not in weights
        and all(name in rewards for arm in chosen for rewards in arm.rewards.values())
    ]
    rows = [
        Row(
            arm,
            {name: mean_reward(arm.values(name)) for name in (*weights, *judged)},
            mean_reward(arm.scalarised(weights)),
            None if arm is ours else paired_gain(ours, arm, weights),
        )
        for arm in chosen
    ]
    # by the paired difference: means over other pairs are of other prompts and noise
    return PreferenceTable(
        dict(weights), sorted(rows, key=lambda row: row.gain.mean if row.gain else 0.0)
    )


def front_table(
    arms: Sequence[Arm], preferences: Sequence[Mapping[str, float]], reference: Mapping[str, float]
) -> list[Front]:
    """Compare the hypervolumes of systems with an arm at every preference, largest first."""
    fronts: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        if any(_at(arm, weights) for weights in preferences):
            fronts.setdefault(arm.system, []).append(arm)
    whole = {system: front for system, front in fronts.items() if len(front) == len(preferences)}
    if OURS not in whole:
        return []
    table = [
        Front(
            system,
            hypervolume(front, reference),
            None if system == OURS else hypervolume_gain(whole[OURS], front, reference),
            sum(arm.costs["unet_forwards"] for arm in front) / len(front),
        )
        for system, front in whole.items()
    ]
    return sorted(table, key=lambda front: -front.volume.mean)


def to_csv(tables: Sequence[PreferenceTable]) -> str:
    """Return all preference tables as one CSV text, with three columns per interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [n for n in tables[0].rows[0].rewards if all(n in t.rows[0].rewards for t in tables)]
    measures = [*names, "scalarised", "msdda_minus_system"]
    bounds = [f"{name}{part}" for name in measures for part in ("", "_low", "_high")]
    costs = list(tables[0].rows[0].arm.costs)
    writer.writerow(["weights", "method", "variant", "images", *bounds, "seconds", *costs])
    for table in tables:
        weights = " ".join(f"{name}={weight:g}" for name, weight in table.weights.items())
        for row in table.rows:
            intervals = [*(row.rewards[name] for name in names), row.scalarised, row.gain]
            cells = [
                f"{value:.4f}" if interval else ""
                for interval in intervals
                for value in (interval[:3] if interval else (0.0,) * 3)
            ]
            arm = row.arm
            price = [f"{arm.seconds:.4g}", *(f"{value:g}" for value in arm.costs.values())]
            who = [weights, arm.method, arm.variant, row.scalarised.pairs]
            writer.writerow([*who, *cells, *price])
    return text.getvalue()


def to_markdown(table: PreferenceTable) -> str:
    """Return one preference table as Markdown."""
    costs = ["UNet forwards", "fastest s / image"]
    head = ["system", "n", *table.weights, "r_w", "MSDDA minus system", *table.judged, *costs]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in table.rows:
        arm = row.arm
        label = f"{arm.method} ({arm.variant})" if arm.variant else arm.method
        cells = [
            f"**{label}**" if row.gain is None else label,
            str(row.scalarised.pairs),
            *(_text(row.rewards[name]) for name in table.weights),
            _text(row.scalarised),
            ""
            if row.gain is None
            else f"{_text(row.gain, sign='+')}{row.verdict and ', '}{row.verdict}",
            *(_text(row.rewards[name]) for name in table.judged),
            f"{arm.costs['unet_forwards']:g}",
            f"{arm.seconds:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _at(arm: Arm, weights: Mapping[str, float]) -> bool:
    """Return whether an arm has these weights, up to the digits that scores keep."""
    return arm.weights.keys() == weights.keys() and all(
        abs(arm.weights[name] - weight) < 1e-5 for name, weight in weights.items()
    )


def _text(interval: Interval, sign: str = "") -> str:
    low, high = f"{interval.low:{sign}.3f}", f"{interval.high:{sign}.3f}"
    return f"{interval.mean:{sign}.3f} [{low}, {high}]"


def _verdict(gain: Interval | None) -> str:
    if gain is None:
        return ""
    if not gain.excludes_zero:
        return "no difference shown"
    return "MSDDA leads" if gain.mean > 0 else "MSDDA is behind"

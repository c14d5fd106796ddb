# SPDX-License-Identifier: Apache-2.0
"""What a system gains over the base model, and whether its pictures stay above two floors.

A reward can be raised by ruining the picture. So a gain counts under two floors: the judge's
objects and colours are not below the base's on the same prompts and seeds, and the mean chroma of
the background lies in the range of the training images.

Intervals are a two-level bootstrap: prompts are resampled, then seeds within each of them, because
images of one prompt are alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from msdda_fast.evaluation.statistics import RESAMPLES, Arm, Interval, Pair, Values
from msdda_fast.rewards.background_chroma import CHROMA_RANGE, Background

__all__ = ["JUDGES", "Floors", "floors", "floors_markdown", "resamples", "two_level"]

JUDGES = ("judge_object", "judge_color")
_CHROMA = Background.name


@dataclass(frozen=True, slots=True)
class Floors:
    """One system at one preference.

    Attributes:
        arm: The images.
        gain: Mean r_w minus the base's, paired.
        judged: Objects and colours that the judge gets right minus the base's, paired.
        chroma: Mean chroma of the background, CIELAB units.
    """

    arm: Arm
    gain: Interval
    judged: Mapping[str, Interval]
    chroma: Interval

    @property
    def judge(self) -> str:
        """Whether the judge's floor holds: "pass", "soft" (not excluded at 95%) or "fail"."""
        return _worst([_verdict(v, 0.0, np.inf) for v in self.judged.values()])

    @property
    def background(self) -> str:
        """Whether the background's floor holds, in the same words."""
        return _verdict(self.chroma, *CHROMA_RANGE)

    @property
    def both(self) -> str:
        """The worse of the two."""
        return _worst([self.judge, self.background])

    @property
    def shortfall(self) -> float:
        """How far the means are below the floors: 0 for "pass".

        In shares of objects and colours, and of the width of the range of the background.
        """
        low, high = CHROMA_RANGE
        outside = max(low - self.chroma.mean, self.chroma.mean - high, 0.0) / (high - low)
        return outside + sum(max(-v.mean, 0.0) for v in self.judged.values())


def floors(arms: Sequence[Arm], weights: Mapping[str, float]) -> list[Floors]:
    """Compare the arms at one preference, and those without weights, with the base model.

    Returns: by gain, the largest first; without systems that share no pair with the base or were
        not judged. Empty if the base was not.
    """
    base = next((arm for arm in arms if arm.method == "SD"), None)
    if base is None:
        return []
    rows = []
    for arm in arms:
        if arm.weights and not _close(arm.weights, weights):
            continue
        pairs = sorted(set(arm.rewards) & set(base.rewards))
        needed = {*weights, *JUDGES, _CHROMA}
        if not pairs or any(needed - a.rewards[p].keys() for a in (arm, base) for p in pairs):
            continue
        rows.append(
            Floors(
                arm,
                two_level(arm.scalarised(weights, pairs) - base.scalarised(weights, pairs), pairs),
                {n: two_level(arm.values(n, pairs) - base.values(n, pairs), pairs) for n in JUDGES},
                two_level(arm.values(_CHROMA, pairs), pairs),
            )
        )
    return sorted(rows, key=lambda row: -row.gain.mean)


def floors_markdown(
    tables: Sequence[tuple[Mapping[str, float], Sequence[Floors]]],
    path_kl: Mapping[tuple[str, str, str], float] | None = None,
) -> str:
    """Return two tables per preference: systems without and with rewards while sampling.

    Args:
        tables: By preference.
        path_kl: Of systems that have one, in nats, by method, variant and weights as in scores.
    """
    heads = ["system", "n", "gain in r_w over SD", "objects", "colours", "background chroma"]
    heads += ["floors", "path KL, nats", "forwards", "backwards", "decodes", "rewards", "s / image"]
    parts = []
    for weights, rows in tables:
        for title, rewarded in (("Without rewards", False), ("With rewards", True)):
            chosen = [row for row in rows if bool(row.arm.costs["reward_calls"]) is rewarded]
            if not chosen:
                continue
            at = ", ".join(f"{weight:g} {name}" for name, weight in weights.items())
            lines = [f"### {title} while sampling, {at}", ""]
            lines += [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
            lines += [f"| {' | '.join(_cells(row, path_kl or {}))} |" for row in chosen]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cells(row: Floors, path_kl: Mapping[tuple[str, str, str], float]) -> list[str]:
    arm, points = row.arm, {name: (100 * np.array(v[:3])) for name, v in row.judged.items()}
    weights = " ".join(f"{name}={weight:g}" for name, weight in arm.weights.items())
    nats = path_kl.get((arm.method, arm.variant, weights))
    return [
        f"{arm.method} ({arm.variant})" if arm.variant else arm.method,
        str(row.gain.pairs),
        f"{row.gain.mean:+.3f} [{row.gain.low:+.3f}, {row.gain.high:+.3f}]",
        *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*points[name]) for name in JUDGES),
        f"{row.chroma.mean:.1f} [{row.chroma.low:.1f}, {row.chroma.high:.1f}]",
        row.both,
        "" if nats is None else f"{nats:.2g}",
        *(f"{value:g}" for value in arm.costs.values()),
        f"{arm.seconds:.2g}",
    ]


def two_level(values: Values, pairs: Sequence[Pair]) -> Interval:
    """Return the mean of one value per pair, (n,), with its two-level bootstrap interval."""
    means = values @ resamples(pairs)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def resamples(pairs: Sequence[Pair]) -> Values:
    """Return weights (n, R) of the values of n pairs in R resamples; the same for equal prompts."""
    return _resampled(tuple(prompt for prompt, _ in pairs))


@lru_cache(maxsize=8)
def _resampled(prompts: tuple[str, ...]) -> Values:
    rng = np.random.default_rng(0)
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    weights = np.zeros((len(prompts), RESAMPLES))
    chosen = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    for times, own in zip(chosen.T, rows.values(), strict=True):
        # a prompt that is drawn k times draws its seeds k times
        draws = rng.multinomial(times * len(own), np.full(len(own), 1 / len(own)))
        weights[own] = draws.T
    resampled: Values = weights / weights.sum(0)
    return resampled


def _verdict(value: Interval, low: float, high: float) -> str:
    if low <= value.mean <= high:
        return "pass"
    return "soft" if value.high >= low and value.low <= high else "fail"


def _worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=("pass", "soft", "fail").index)


def _close(own: Mapping[str, float], weights: Mapping[str, float]) -> bool:
    return own.keys() == weights.keys() and all(abs(own[n] - weights[n]) < 1e-5 for n in weights)

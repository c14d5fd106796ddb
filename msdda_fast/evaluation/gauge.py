# SPDX-License-Identifier: Apache-2.0
"""What each way to merge keeps of MSDDA's gain, and how the factor merge depends on its gauge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from msdda_fast.evaluation.figures import label_of, save
from msdda_fast.evaluation.floors import resamples
from msdda_fast.evaluation.rotations import averaged_rotations, rotations_of
from msdda_fast.evaluation.statistics import Arm, Interval, Values
from msdda_fast.evaluation.tables import OURS

__all__ = ["Share", "gauge_figure", "shares_kept"]


@dataclass(frozen=True, slots=True)
class Share:
    """The share of MSDDA's gain in r_w over the base that a merge keeps.

    Attributes:
        system: Method and variant.
        share: (merge - base) / (MSDDA - base), no unit, over the pairs that all have, with its 95%
            interval: a two-level bootstrap over prompts and seeds, of both gains together.
        rotations: The same of each rotation, for a merge averaged over them.
    """

    system: tuple[str, str]
    share: Interval
    rotations: Sequence[float] = ()


def shares_kept(arms: Sequence[Arm], weights: Mapping[str, float]) -> list[Share]:
    """Return the shares of the merges at one preference; empty without MSDDA, base or merges."""
    w = next(iter(weights.values()))
    base = [arm for arm in arms if arm.method == "SD"]
    ours = [arm for arm in arms if arm.system == OURS and arm.w == w]
    soups = [arm for arm in averaged_rotations(arms) if arm.method == "RS" and arm.w == w]
    if not (base and ours and soups):
        return []
    pairs = sorted(set.intersection(*(set(a.rewards) for a in (base[0], ours[0], *soups))))
    if not pairs:
        return []

    def gain(arm: Arm) -> Values:
        return arm.scalarised(weights, pairs) - base[0].scalarised(weights, pairs)

    whole, resampled = gain(ours[0]), resamples(pairs)

    def share(arm: Arm) -> Interval:
        part = gain(arm)
        low, high = np.quantile((part @ resampled) / (whole @ resampled), [0.025, 0.975])
        return Interval(float(part.mean() / whole.mean()), float(low), float(high), len(pairs))

    each = [share(arm).mean for arm in rotations_of(arms, w)]
    return [
        Share(
            arm.system,
            share(arm),
            each if "rotations" in arm.variant else (),
        )
        for arm in soups
    ]


def gauge_figure(shares: Mapping[str, Sequence[Share]], file: Path) -> None:
    """Draw the shares of each merge, with a dot for each rotation, one panel per preference.

    Args:
        shares: By title of the panel.
        file: PNG to write.
    """
    # the longest panel first: rows are shared, and others may lack some
    longest = max(shares.values(), key=len)
    others = (share for panel in shares.values() for share in panel)
    systems = list(dict.fromkeys(share.system for share in (*longest, *others)))
    figure, row = plt.subplots(
        1, len(shares), figsize=(5.2 * len(shares) + 1.6, 2.9), layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    for axes, (title, panel) in zip(row[0], shares.items(), strict=True):
        for share in panel:
            place = systems.index(share.system)
            mean, low, high, _ = share.share
            axes.barh(place, mean, height=0.55, color="#c8d6e5", zorder=2)
            axes.plot(share.rotations, [place] * len(share.rotations), "o", color="#1a1a1a",
                      markersize=4, alpha=0.7, zorder=3)  # fmt: skip
            ends = [[max(mean - low, 0.0)], [max(high - mean, 0.0)]]
            axes.errorbar(mean, place, xerr=ends, color="#5a6b7b", capsize=3, linewidth=1.2)
            axes.annotate(f"{mean:.2f}", (0.02, place), va="center", fontsize=9, zorder=4)
        axes.axvline(1.0, color="#d62728", linewidth=1.3)
        axes.annotate("MSDDA", (1.0, -0.75), color="#d62728", ha="center", fontsize=9)
        axes.set_yticks(range(len(systems)), [label_of(system) for system in systems])
        axes.set_ylim(len(systems) - 0.4, -1.0)
        axes.set_xlabel("share of MSDDA's gain over SD; a dot: one rotation")
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)

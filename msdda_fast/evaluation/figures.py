# SPDX-License-Identifier: Apache-2.0
"""Pareto fronts of two objectives, and rewards over the simplex of three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files, whatever display there is

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patheffects import withStroke
from matplotlib.tri import Triangulation

from msdda_fast.evaluation.statistics import Arm, mean_reward
from msdda_fast.files import write_atomically

__all__ = ["label_of", "pareto_figure", "save", "simplex_figure"]

_OURS = ("MSDDA", "")
_INK, _SOFT, _RED = "#1a1a1a", "#8a8a8a", "#d62728"
_MARKERS = "osD^vPX<>hdp"


def label_of(system: tuple[str, str]) -> str:
    """Return the method, with its variant in brackets if it has one."""
    method, variant = system
    return f"{method} ({variant})" if variant else method


def pareto_figure(arms: Sequence[Arm], rewards: tuple[str, str], file: Path) -> None:
    """Draw mean rewards with 95% intervals, one line per system through its preferences.

    Systems that evaluate rewards while sampling have a separate panel; MSDDA is in both. The points
    of a panel use the prompts and seeds that all its systems share, if there are any.

    Args:
        arms: With and without weights; those of MSDDA are drawn thickest.
        rewards: The rewards on the horizontal and the vertical axis.
        file: PNG to write.
    """
    systems: dict[tuple[str, str], list[Arm]] = {}
    for arm in sorted(arms, key=lambda a: -1.0 if a.w is None else a.w):
        systems.setdefault(arm.system, []).append(arm)
    fronts = [systems[system] for system in sorted(systems, key=lambda s: s != _OURS)]
    searches = [front for front in fronts[1:] if front[0].costs["reward_calls"]]
    panels = {"aligned models": [front for front in fronts if front not in searches]}
    if searches:
        panels["rewards while sampling"] = [fronts[0], *searches]
    figure, row = plt.subplots(
        1, len(panels), figsize=(7.2 * len(panels), 7.2), layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes, (title, shown) in zip(row[0], panels.items(), strict=True):
        _pareto_panel(axes, _on_common_pairs(shown), rewards)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"{rewards[0]} reward, mean and 95% interval")
    row[0][0].set_ylabel(f"{rewards[1]} reward, mean and 95% interval")
    save(figure, file)


def _on_common_pairs(fronts: Sequence[Sequence[Arm]]) -> Sequence[Sequence[Arm]]:
    shared = set.intersection(*(set(arm.rewards) for front in fronts for arm in front))
    if not shared:
        return fronts
    return [
        [
            replace(arm, rewards={pair: arm.rewards[pair] for pair in sorted(shared)})
            for arm in front
        ]
        for front in fronts
    ]


def _pareto_panel(
    axes: Any,  # noqa: ANN401 - matplotlib has no types
    fronts: Sequence[Sequence[Arm]],
    rewards: tuple[str, str],
) -> None:
    # red is taken
    colors = [c for i, c in enumerate(plt.get_cmap("tab20").colors) if i not in (6, 7)]
    colors = colors[::2] + colors[1::2]
    for i, front in enumerate(fronts):
        ours, alone = front[0].system == _OURS, front[0].w is None
        color = _RED if ours else colors[i % len(colors)]
        points = [[mean_reward(arm.values(name)) for name in rewards] for arm in front]
        x, y = ([point[axis] for point in points] for axis in (0, 1))
        counts = sorted({interval.pairs for interval in x})
        axes.plot(
            [v.mean for v in x],
            [v.mean for v in y],
            color=color,
            marker="*" if alone else _MARKERS[i % len(_MARKERS)],
            markersize=13 if alone else 6 + 2 * ours,
            linewidth=2.6 if ours else 1.3,
            zorder=4 if ours else 3,
            label=f"{label_of(front[0].system)}, n = {'/'.join(map(str, counts))}",
        )
        axes.errorbar(
            [v.mean for v in x],
            [v.mean for v in y],
            xerr=[[v.mean - v.low for v in x], [v.high - v.mean for v in x]],
            yerr=[[v.mean - v.low for v in y], [v.high - v.mean for v in y]],
            color=color,
            linestyle="none",
            elinewidth=0.8,
            alpha=0.8 if ours else 0.25,
            zorder=2,
        )
        for arm, px, py in zip(front, x, y, strict=True):
            if ours and axes.get_subplotspec().is_first_col():
                axes.annotate(
                    f"w = {arm.w:g}", (px.mean, py.mean), textcoords="offset points",
                    xytext=(9, 7), color=_INK, fontsize=9, zorder=5,
                    path_effects=[withStroke(linewidth=3, foreground="white")],
                )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False, fontsize=8.5,
        title="images per point: n", title_fontsize=8.5,
    )  # fmt: skip


def simplex_figure(arms: Sequence[Arm], rewards: Sequence[str], file: Path) -> None:
    """Draw each of three mean rewards of one system over the triangle of preferences.

    Args:
        arms: Arms at three or more preferences that are not on a line.
        rewards: Three names, one for each corner.
        file: PNG to write.
    """
    corners = np.array([[0.5, np.sqrt(3) / 2], [0.0, 0.0], [1.0, 0.0]])
    places = np.array([[arm.weights.get(name, 0.0) for name in rewards] for arm in arms]) @ corners
    figure, row = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for name, axes in zip(rewards, row, strict=True):
        values = np.array([mean_reward(arm.values(name)).mean for arm in arms])
        shades = axes.tricontourf(Triangulation(*places.T), values, levels=14, cmap="viridis")
        axes.plot(*corners[[0, 1, 2, 0]].T, color=_INK, linewidth=1)
        axes.plot(*places.T, ".", color="white", markersize=11, markeredgecolor=_INK)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}", place, textcoords="offset points", xytext=(0, 8), ha="center",
                fontsize=8, color=_INK, bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1},
            )  # fmt: skip
        for corner, other, offset in zip(corners, rewards, (24, -20, -20), strict=True):
            axes.annotate(
                f"all {other}", corner, textcoords="offset points", xytext=(0, offset),
                ha="center", fontsize=9, color=_SOFT,
            )  # fmt: skip
        axes.set_title(f"{name} reward", fontsize=11, pad=18)
        axes.set_xlim(-0.14, 1.14)
        axes.set_ylim(-0.16, 1.0)
        axes.set_aspect("equal")
        axes.axis("off")
        figure.colorbar(shades, ax=axes, shrink=0.7)
    save(figure, file)


def save(figure: Any, file: Path) -> None:  # noqa: ANN401 - matplotlib has no types
    """Write a figure as a PNG file, and close it."""
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=140))
    plt.close(figure)

# SPDX-License-Identifier: Apache-2.0
"""The curves of a run as one picture, redrawn from its log during training."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msdda_fast.errors import BackendUnavailable
from msdda_fast.files import write_atomically
from msdda_fast.training.log import read_log

CURVES_NAME = "curves.png"
_REFRESH_SECONDS = 5.0
_SPAN = 0.1  # of the run, over which the thick line averages,
_LEAST = 5  # but this many rows at least
_LABELS = {  # in this order; a log has some of them
    "reward": "reward",
    "loss": "loss",
    "accuracy": "accuracy",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "kl": "distance to the base model",
    "drift_chosen": "drift, chosen",
    "clip_fraction": "clipped transitions",
    "ratio_deviation": "change of the policy, |ratio - 1|",
    "grad_norm": "gradient norm",
}


class LiveCurves:
    """Draws the log of a run as `curves.png` in its folder, at most every few seconds.

    Raises:
        BackendUnavailable: matplotlib is missing.
    """

    def __init__(self, out_dir: Path, title: str, *, enabled: bool = True) -> None:
        self._out_dir, self._title, self._enabled = out_dir, title, enabled
        self._drawn = 0.0
        if enabled and find_spec("matplotlib") is None:
            raise BackendUnavailable(
                "curves need matplotlib: pip install 'msdda-fast[train]', or curves=False"
            )

    def refresh(self, *, now: bool = False) -> None:
        """Draw the current log, unless it was drawn a moment ago and `now` is False."""
        if not self._enabled:
            return
        if now or time.monotonic() - self._drawn > _REFRESH_SECONDS:
            draw_curves(read_log(self._out_dir), self._out_dir / CURVES_NAME, self._title)
            self._drawn = time.monotonic()


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot each known quantity of `rows` against their first column, and write it atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        return
    axis = next(iter(rows[0]))
    names = [name for name in _LABELS if name in rows[0]]
    x = [row[axis] for row in rows]
    across = 2 if len(names) == 4 else min(3, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(4.2 * across, 0.5 + 2.6 * down), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {axis} {x[-1]}")
    for index, name in enumerate(names):
        plot = figure.add_subplot(down, across, index + 1)
        values = [float(row[name]) for row in rows]
        color = f"C{index}"
        plot.plot(x, values, color=color, alpha=0.3, linewidth=0.8)
        plot.plot(x, _smoothed(values), color=color, linewidth=1.8)
        plot.set_title(_LABELS[name], fontsize=10)
        plot.set_xlabel(axis)
        plot.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        plot.grid(alpha=0.25)
        if name == "clip_fraction":
            plot.set_ylim(-0.03, 1.03)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _smoothed(values: list[float]) -> list[float]:
    """Return the means over windows that end at each value."""
    width = max(_LEAST, round(_SPAN * len(values)))
    return [
        sum(part) / len(part)
        for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    ]

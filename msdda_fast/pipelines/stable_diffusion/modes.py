# SPDX-License-Identifier: Apache-2.0
"""The modes of a generation: exact, or approximate with an estimate of the error.

    "exact"      every objective's network in every step; the default.
    "merged"     one network with the adapters merged by precision: the limit of Rewarded Soups.
    "hybrid"     merged, and exact in the last fifth of the steps.

An approximate mode has a few kinds of step, each of constant shapes and captured once; `plan` gives
the kind of each step of a generation. Both approximate modes have the same kinds.

The last steps are the sensitive ones. The error of an output counts |B| / sigma_w fold, squared:
over 25 steps of Stable Diffusion's schedule that is 0.55 to 0.76 up to the last fifth, and up to
5.1 in it.
"""

from __future__ import annotations

from math import ceil
from typing import Literal, get_args

from msdda_fast.errors import InvalidMode
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["MODES", "Mode", "check_mode", "exact_steps", "plan"]

Mode = Literal["exact", "merged", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)

EXACT_FRACTION = 0.2

#: Approximate steps from one exact refresh to the next.
REFRESH = 8


def check_mode(mode: Mode, *, in_parallel: bool) -> None:
    """Raise `InvalidMode` unless `mode` is one of `MODES`, and "exact" in parallel runs."""
    if mode not in MODES:
        raise InvalidMode(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if in_parallel and mode != "exact":
        raise InvalidMode(f'several processes sample with mode="exact" only, got {mode!r}')


def exact_steps(mode: Mode, num_steps: int) -> int:
    """Return how many of the last of `num_steps` steps are always exact."""
    return {"exact": num_steps, "hybrid": ceil(EXACT_FRACTION * num_steps)}.get(mode, 0)


def plan(mode: Mode, table: CoefficientTable) -> list[str]:
    """Return the kind of each of T steps: "exact", or "refresh" or "merged" in approximate modes.

    Steps at which only one objective has influence are exact in every mode.
    """
    exact_from = len(table) - exact_steps(mode, len(table))
    kinds: list[str] = []
    done = 0  # approximate steps so far
    for k, runs in enumerate(table.influence.sum(1).tolist()):
        if k >= exact_from or runs == 1:
            kinds.append("exact")
        else:
            kinds.append("refresh" if done % REFRESH == 0 else "merged")
            done += 1
    return kinds

# SPDX-License-Identifier: Apache-2.0
"""The modes of a generation: exact, or approximate with an estimate of the error.

    "exact"      every objective's network in every step; the default.
    "merged"     one network, its adapters merged by precision: the limit of Rewarded Soups.
    "auto"       merged, and exact where the divergence would exceed a budget; see `forecast`.

An approximate mode has a few kinds of step, each of constant shapes and captured once; a `StepPlan`
gives the kind of each step of a generation. Both approximate modes have the same kinds:

    "exact"      every objective's network.
    "merged"     the merged network.
    "both"       both, for their difference; each image goes on with one of them.

The last steps are the sensitive ones. The error of an output counts |B| / sigma_w fold, squared:
over 25 steps of Stable Diffusion's schedule that is 0.55 to 0.76 up to the last fifth, and up to
5.1 in it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from msdda_fast.errors import InvalidMode
from msdda_fast.pipelines.stable_diffusion.merging import merged_shares
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["MODES", "Mode", "StepPlan", "check_mode", "merged_plan"]

Mode = Literal["exact", "merged", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Approximate steps of "merged" from one that measures the error to the next.
REFRESH = 8


def check_mode(
    mode: Mode, kl_budget: float | None = None, *, in_parallel: bool, masks: object = None
) -> None:
    """Raise `InvalidMode` unless `mode` is one of `MODES`, and "exact" in parallel or with masks.

    A budget is of mode "auto", in nats and not negative. Several processes take no masks.
    """
    if mode not in MODES:
        raise InvalidMode(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if masks is not None and mode != "exact":
        raise InvalidMode(
            f'masks need mode="exact", got {mode!r}: one merged network has the same weights in '
            "all pixels"
        )
    if masks is not None and in_parallel:
        raise InvalidMode("masks are for one process, and this pipeline samples with several")
    if in_parallel and mode != "exact":
        raise InvalidMode(f'several processes sample with mode="exact" only, got {mode!r}')
    if kl_budget is None:
        return
    if mode != "auto":
        raise InvalidMode(f'kl_budget is what mode="auto" may spend, and mode is {mode!r}')
    if isinstance(kl_budget, str) or not kl_budget >= 0:  # NaN fails too
        raise InvalidMode(f"kl_budget must be at least 0 nats, got {kl_budget!r}")


class StepPlan(NamedTuple):
    """Which networks run in each of T steps, made before the first.

    Attributes:
        kinds: (T,), the kind of each step.
        exact: (T, B) on the host, whether the image goes on with the exact step.
        shares: (T, B, M) on the host, at which adapters are merged.
    """

    kinds: list[str]
    exact: Tensor
    shares: Tensor

    @classmethod
    def of(cls, exact: Tensor, table: CoefficientTable) -> StepPlan:
        """The cheapest plan in which these images, (T, B), have these steps exact."""
        kinds = []
        for step in exact:
            kinds.append("exact" if step.all() else "both" if step.any() else "merged")
        return cls(kinds, exact, merged_shares(table))

    @classmethod
    def comparing(cls, table: CoefficientTable) -> StepPlan:
        """Exact steps that each measure what the merged one would have done."""
        reads = (table.reads & torch.tensor(table.active)).sum(1)
        kinds = ["exact" if count == 1 else "both" for count in reads.tolist()]
        every = torch.ones(table.share.shape[:2], dtype=torch.bool)
        return cls(kinds, every, merged_shares(table))


def merged_plan(table: CoefficientTable) -> StepPlan | None:
    """Return the plan of mode "merged"; None: every step is exact.

    Steps at which only one objective has influence are exact.
    """
    kinds: list[str] = []
    done = 0  # approximate steps so far
    for runs in table.influence.sum(1).tolist():
        if runs == 1:
            kinds.append("exact")
        else:
            kinds.append("both" if done % REFRESH == 0 else "merged")
            done += 1
    if done == 0:
        return None
    exact = torch.tensor([kind != "merged" for kind in kinds])
    exact = exact[:, None].expand(-1, table.share.shape[1])
    return StepPlan(kinds, exact, merged_shares(table))

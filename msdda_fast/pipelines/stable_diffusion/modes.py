# SPDX-License-Identifier: Apache-2.0
"""The modes of a generation: exact, or approximate with an estimate of what that changes.

    "exact"      every objective's network in every step; the default.
    "staggered"  the objectives' deep features are renewed in turn, one objective per step.
    "merged"     one network with the adapters merged by precision: the limit of Rewarded Soups.
    "hybrid"     merged, and exact in the last fifth of the steps.

An approximate mode has a few kinds of step, each of constant shapes and captured once; `plan` says
which of them each step of a generation is. "hybrid" has those of "merged".

The last steps are the sensitive ones. The error of an output counts |B| / sigma_w fold, squared:
over 25 steps of Stable Diffusion's schedule that is 0.55 to 0.76 up to the last fifth, and up to
5.1 in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.buffers import ShapeKey, StepBuffers
from msdda_fast.engine.step import Predict
from msdda_fast.pipelines.stable_diffusion.approximations import Approximation, Merged, Staggered
from msdda_fast.pipelines.stable_diffusion.merged import MergedUNet
from msdda_fast.pipelines.stable_diffusion.step_kl import step_kl
from msdda_fast.steps.coefficients import CoefficientTable, StepCoefficients

__all__ = ["MODES", "Mode", "ModeNetwork", "exact_steps", "plan"]

Mode = Literal["exact", "staggered", "merged", "hybrid"]
MODES: tuple[Mode, ...] = get_args(Mode)

EXACT_FRACTION = 0.2

#: Approximate steps from one exact refresh to the next.
REFRESH = 8


def exact_steps(mode: Mode, num_steps: int) -> int:
    """How many steps at the end are exact whatever happens before, of `num_steps`."""
    return {"exact": num_steps, "hybrid": ceil(EXACT_FRACTION * num_steps)}.get(mode, 0)


def plan(mode: Mode, table: CoefficientTable) -> list[str]:
    """The kind of each of T steps: "exact", or one of the approximation of the mode.

    Steps at which one objective alone has influence are exact in every mode.
    """
    active = (table.share != 0).any(1)  # (T, M)
    count = int(active.any(0).sum())
    exact_from = len(table) - exact_steps(mode, len(table))
    kinds: list[str] = []
    done = 0  # approximate steps so far
    for k, runs in enumerate(active.sum(1).tolist()):
        if k >= exact_from or runs == 1:
            kinds.append("exact")
            continue
        if mode == "staggered":
            # ages and errors are known from the second refresh on, so it follows at once
            fresh = done == 0 or (done - 1) % REFRESH == 0
            kinds.append("refresh" if fresh else f"renew {done % count}")
        else:
            kinds.append("refresh" if done % REFRESH == 0 else "merged")
        done += 1
    return kinds


class ModeNetwork:
    """`engine.step.Kinds` of an approximate mode, for requests of one shape.

    Args:
        network: Of the objectives that run.
        key: Its `mode` is "staggered" or "merged".
        buffers: Get `conditioning` of their own.

    Attributes:
        kinds: See `plan`.
        step_kl: Estimated KL divergence of each step from the exact one, (T, B) nats; written by
            approximate steps. See `step_kl.step_kl`.

    Raises:
        UnsupportedNetwork: The mode cannot run it.
    """

    kinds: Mapping[str, Predict]

    def __init__(self, network: BatchedUNet, key: ShapeKey, buffers: StepBuffers) -> None:
        self._network, self._key, self._buffers = network, key, buffers
        size, x = (key.max_steps, key.shape[0]), buffers.x
        self.step_kl = x.new_zeros(size)
        self._std = buffers.conditioning["std"] = x.new_zeros(size)
        share = buffers.conditioning["share"] = x.new_zeros(*size, len(key.active))
        self._approximation: Approximation
        if key.mode == "staggered":
            self._approximation = Staggered(network, key, x)
        else:
            merged = MergedUNet(network.adapters)
            self._approximation = Merged(network, merged, key, x, share)
        self.kinds = {"exact": self._exact} | {
            kind: partial(self._approximate, kind) for kind in self._approximation.kinds
        }

    def conditioning(self, table: CoefficientTable) -> dict[str, Tensor]:
        """Start a request: what to load into the buffers for it; nothing is estimated yet."""
        self.step_kl.zero_()
        rows = self._key.max_steps - len(table)
        return {
            "share": functional.pad(table.share, (0, 0, 0, 0, 0, rows)),
            "std": functional.pad(table.std, (0, 0, 0, rows)),
        }

    def begin(
        self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool, k: int
    ) -> None:
        """See `ActiveObjectives.begin`; `k` is the step to come, whose shares are taken."""
        rows = [embeds[m] for m in self._network.objectives]
        self._approximation.begin(torch.stack(rows[:1] if shared else rows), timesteps, k)

    def mix(self, k: int) -> None:
        """Take the shares of step k, where they are not those of the step before."""
        self._approximation.mix(k)

    def storages(self) -> Mapping[str, Tensor]:
        """See `engine.step.Kinds`."""
        return {**self._approximation.storages(), "step_kl": self.step_kl}

    def _exact(self, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        return self._spread(self._network(next_input[0], k))

    def _approximate(self, kind: str, next_input: Tensor, k: Tensor) -> list[Tensor | None]:
        outputs, errors = self._approximation.kinds[kind](next_input[0], k)
        if errors is not None:
            self._estimate(outputs, errors, k)
        return self._spread(outputs)

    def _estimate(self, outputs: Tensor, errors: Tensor, k: Tensor) -> None:
        x, at = self._buffers.x, k[None]
        row = self._buffers.rows.index_select(0, at)[0]
        wide = outputs.to(x)
        kl = step_kl(
            x,
            self._spread(wide),
            self._spread(wide + errors),
            StepCoefficients(row, len(self._key.active), self._key.clip_range),
            self._std.index_select(0, at)[0],
        )
        self.step_kl.index_copy_(0, at, kl[None])

    def _spread(self, outputs: Tensor) -> list[Tensor | None]:
        """The outputs of the active objectives, at their places among all."""
        found = dict(zip(self._network.objectives, outputs, strict=True))
        return [found.get(m) for m in range(len(self._key.active))]

# SPDX-License-Identifier: Apache-2.0
"""The exact outputs of all objectives; those that share a network share its forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.side_by_side import SideBySide

__all__ = ["ExactNetwork", "Forward", "step_kind"]

#: `BatchedUNet.forward`, or another function that computes the same.
Forward = Callable[[Tensor, Tensor], Tensor]


def step_kind(kind: str, runs: Sequence[bool]) -> str:
    """Return the name of a kind of step, "exact" or another, that runs these objectives."""
    return f"{kind} " + ",".join(str(m) for m, on in enumerate(runs) if on)


class ExactNetwork:
    """`engine.step.Network` with a kind of step per set of objectives that run.

    Args:
        members: By kind of step, the batched forward of each network and the objectives it runs.
        count: M; objectives that no member runs have no output.
        dtype: Dtype of the outputs.

    Attributes:
        forwards: How many networks each kind of step runs on an image.
    """

    step_kl: None = None
    merged_kl: None = None

    def __init__(
        self,
        members: Mapping[str, Sequence[tuple[BatchedUNet, Sequence[int]]]],
        count: int,
        dtype: torch.dtype,
    ) -> None:
        self._count = count
        self._members = [
            _Member(unet, objectives, unet, dtype)
            for group in members.values()
            for unet, objectives in group
        ]
        each = iter(self._members)
        grouped = {kind: [next(each) for _ in group] for kind, group in members.items()}
        self.forwards = {
            kind: sum(len(member.objectives) for member in group) for kind, group in grouped.items()
        }
        self._kinds = {
            kind: partial(
                self._predict,
                SideBySide(group),
                [m for member in group for m in member.objectives],
            )
            for kind, group in grouped.items()
        }

    @property
    def kinds(self) -> Mapping[str, Callable[[Tensor, Tensor], list[Tensor | None]]]:
        """The kinds of step by name; see `step_kind`."""
        return self._kinds

    def storages(self) -> Mapping[str, Tensor]:
        """Return the tensors of every member i, with names that start with "i."."""
        return {
            f"{i}.{name}": tensor
            for i, member in enumerate(self._members)
            for name, tensor in member.unet.storages().items()
        }

    def begin(
        self, embeds: Mapping[int, Tensor], timesteps: Tensor, *, shared: bool, k: int
    ) -> None:
        """Set the prompts of a request, at its start or between two steps; see `BatchedUNet.begin`.

        Args:
            embeds: (K, B, L, D) by active objective.
            timesteps: (T,) int64.
            shared: Whether the embeddings are the same for all objectives.
            k: The next step; not used here.
        """
        for member in self._members:
            rows = [embeds[m] for m in member.objectives]
            member.unet.begin(torch.stack(rows[:1] if shared else rows), timesteps)

    def mix(self, k: int) -> None:
        """Do nothing: shares do not affect exact networks."""

    def run_through(self, choose: Callable[[BatchedUNet], Forward]) -> None:
        """Evaluate each member by what `choose` returns for it, which reads its prompts.

        The first choice stays. Not for captured steps.
        """
        for member in self._members:
            if not member.is_chosen:
                member.run, member.is_chosen = choose(member.unet), True

    def _predict(
        self, run: SideBySide, order: Sequence[int], next_input: Tensor, k: Tensor
    ) -> list[Tensor | None]:
        outputs: list[Tensor | None] = [None] * self._count
        for m, output in zip(order, run(next_input, k), strict=True):
            outputs[m] = output
        return outputs


@dataclass(slots=True, eq=False)
class _Member:
    """A batched forward, the objectives that it runs, and what evaluates it."""

    unet: BatchedUNet
    objectives: Sequence[int]
    run: Forward
    dtype: torch.dtype
    is_chosen: bool = False

    def __call__(self, next_input: Tensor, k: Tensor) -> Tensor:
        return self.run(next_input[0], k).to(self.dtype)  # it makes its own rows, so R = 1

# SPDX-License-Identifier: Apache-2.0
"""This rank's share of the objectives, in batched forwards, and the outputs of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.assignment import Work
from msdda_fast.engine.exchange import Exchange
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.engine.step import Shared
from msdda_fast.pipelines.stable_diffusion.exact import Forward

__all__ = ["RankNetwork"]


class RankNetwork:
    """`engine.step.Network` of one of several processes, exact, with a kind of step per set.

    Args:
        parallel: The processes.
        exchanges: Where the outputs of each kind of step go.
        build: Makes batched forwards of some objectives (flags), one per network, each with the
            objectives that it runs.
        dtype: Dtype of the outputs.

    Attributes:
        exchanges: As given.
        forwards: How many networks all ranks run on an image in each kind of step.
    """

    step_kl: None = None
    merged_kl: None = None

    def __init__(
        self,
        parallel: ObjectiveParallel,
        exchanges: Mapping[str, Exchange],
        build: Callable[[Sequence[bool]], list[tuple[BatchedUNet, list[int]]]],
        dtype: torch.dtype,
    ) -> None:
        self.exchanges = dict(exchanges)
        self.forwards = {kind: sum(exchange.active) for kind, exchange in exchanges.items()}
        self._dtype = dtype
        self._members = {
            kind: [
                _Member(unet, Work(tuple(objectives), work.start, work.stop), unet)
                for work in exchange.works
                for unet, objectives in build(
                    [m in work.objectives for m in range(len(exchange.active))]
                )
            ]
            for kind, exchange in exchanges.items()
        }
        self._kinds = {
            kind: Shared(partial(self._evaluate, kind), parallel.gather) for kind in exchanges
        }

    @property
    def kinds(self) -> Mapping[str, Shared]:
        """The kinds of step by name; see `exact.step_kind`."""
        return self._kinds

    def storages(self) -> Mapping[str, Tensor]:
        """Return the tensors of every member i, with names that start with "i.", and the rows."""
        named = {f"{kind}.outputs": exchange.mine for kind, exchange in self.exchanges.items()}
        for i, member in enumerate(self._all()):
            named |= {f"{i}.{name}": tensor for name, tensor in member.unet.storages().items()}
        return named

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
        for member in self._all():
            work = member.work
            rows = [embeds[m][work.start : work.stop] for m in work.objectives]
            member.unet.begin(torch.stack(rows[:1] if shared else rows), timesteps)

    def mix(self, k: int) -> None:
        """Do nothing: shares do not affect exact networks."""

    def run_through(self, choose: Callable[[BatchedUNet], Forward]) -> None:
        """Evaluate each member by what `choose` returns for it; see `ExactNetwork.run_through`."""
        for member in self._all():
            if member.run is member.unet:
                member.run = choose(member.unet)

    def _evaluate(self, kind: str, next_input: Tensor, k: Tensor) -> None:
        exchange = self.exchanges[kind]
        for member in self._members[kind]:
            outputs = member.run(next_input[0], k).to(self._dtype)
            exchange.put(member.work, outputs.unbind())
        if not self._members[kind]:
            exchange.mine.zero_()  # a graph of nothing is an error

    def _all(self) -> list[_Member]:
        return [member for members in self._members.values() for member in members]


@dataclass(slots=True, eq=False)
class _Member:
    """A batched forward, what of the step it evaluates, and by what."""

    unet: BatchedUNet
    work: Work
    run: Forward

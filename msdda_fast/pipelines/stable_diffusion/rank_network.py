# SPDX-License-Identifier: Apache-2.0
"""This rank's share of the objectives, in batched forwards, and the outputs of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.engine.assignment import Work
from msdda_fast.engine.exchange import Exchange
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.engine.step import Shared

__all__ = ["RankNetwork"]

_Members = list[tuple[BatchedUNet, Work]]


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
        self._members: dict[str, _Members] = {
            kind: [
                (unet, Work(tuple(objectives), work.start, work.stop))
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
        for i, (unet, _) in enumerate(self._all()):
            named |= {f"{i}.{name}": tensor for name, tensor in unet.storages().items()}
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
        for unet, work in self._all():
            rows = [embeds[m][work.start : work.stop] for m in work.objectives]
            unet.begin(torch.stack(rows[:1] if shared else rows), timesteps)

    def mix(self, k: int) -> None:
        """Do nothing: shares do not affect exact networks."""

    def _evaluate(self, kind: str, next_input: Tensor, k: Tensor) -> None:
        exchange = self.exchanges[kind]
        for unet, work in self._members[kind]:
            exchange.put(work, unet(next_input[0], k).to(self._dtype).unbind())
        if not self._members[kind]:
            exchange.mine.zero_()  # a graph of nothing is an error

    def _all(self) -> Iterator[tuple[BatchedUNet, Work]]:
        for members in self._members.values():
            yield from members

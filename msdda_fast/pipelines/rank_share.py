# SPDX-License-Identifier: Apache-2.0
"""The output of a stock network for all objectives, of which each process evaluated some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msdda_fast.engine.assignment import assign
from msdda_fast.engine.exchange import Exchange
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.pipelines.hidden_axis import HiddenAxis
from msdda_fast.pipelines.rows import Call
from msdda_fast.torch_private import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["RankShare"]


class RankShare:
    """Which objectives this rank evaluates in a call of a pipeline, and the outputs of all.

    Whole objectives only: how a family runs guidance, in the rows of a forward or in two forwards,
    cannot be told from outside. A rank that is left without one evaluates what another one does,
    and so knows the shapes of outputs; its own are dropped.

    Args:
        parallel: The ranks, inside a `generation`.
        count: M.

    Attributes:
        own: The objectives of this rank, at least one.
    """

    def __init__(self, parallel: ObjectiveParallel, count: int) -> None:
        self._parallel, self._count = parallel, count
        shares = assign([True] * count, 1, parallel.size, split_guidance=False)
        mine = [m for work in shares[parallel.rank] for m in work.objectives]
        self.own = mine or [parallel.rank % count]
        self._exchanges: dict[object, Exchange] = {}

    def narrowed(self, arguments: Any) -> Any:  # noqa: ANN401 - any nest
        """Return arguments of all objectives as those of this rank."""
        return tree_map_only(HiddenAxis, lambda v: HiddenAxis(v.stacked[self.own]), arguments)

    def gathered(self, output: Any, call: Call) -> Any:  # noqa: ANN401 - the network's own
        """Hide the objective axis of the outputs of all ranks.

        Args:
            output: Of this rank's objectives, with their axis hidden.
            call: Of the network. Its first argument, the state, is compared where hosts meet.

        Raises:
            RankLost, RanksDiffer: See `ObjectiveParallel.share`.
        """
        leaves, spec = tree_flatten(output)
        where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        exchanges = [self._filled(index, leaves[index]) for index in where]
        states = [
            leaf
            for leaf in tree_leaves(call.named[0][1])
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        own = [leaf for leaf in states if not isinstance(leaf, HiddenAxis)]
        self._parallel.share(exchanges, own)
        for index, exchange in zip(where, exchanges, strict=True):
            parts = [part for part in exchange.outputs() if part is not None]
            leaves[index] = HiddenAxis(torch.cat(parts))  # a copy: loops keep several predictions
        return tree_unflatten(leaves, spec)

    def _filled(self, index: int, leaf: Tensor) -> Exchange:
        count = len(self.own)
        stacked = leaf.stacked if isinstance(leaf, HiddenAxis) else leaf.expand(count, *leaf.shape)
        key = (index, stacked.shape, stacked.dtype)
        if key not in self._exchanges:
            self._exchanges[key] = self._parallel.exchange(
                [True] * self._count, 1, stacked.shape[1:], stacked.dtype, stacked.device
            )
        exchange = self._exchanges[key]
        for work in exchange.works:
            exchange.put(work, list(stacked[:, None]))
        return exchange

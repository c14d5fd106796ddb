# SPDX-License-Identifier: Apache-2.0
"""One network of a stock pipeline, run for M objectives while the pipeline sees one.

Inside the hook the rows of every argument are repeated M times, objective-major; the output is
handed back with the objective axis hidden. Whether a network treats its rows independently, and
which of its arguments have rows, cannot be read off its code: the first call of a kind also runs
the objectives one after another, uncompiled, and compares. A network that fails keeps running that
way; one that does not may be captured as a graph from then on.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from msdda_fast.adapters.grouped import GroupedAdapters
from msdda_fast.adapters.switching import AdapterSwitch, adapter_names
from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.engine.compiled import without_compiling
from msdda_fast.engine.graph import Capture
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.forward_graphs import ForwardGraphs
from msdda_fast.pipelines.rank_share import RankShare
from msdda_fast.pipelines.row_arguments import row_arguments
from msdda_fast.pipelines.rows import Call, disagreement, only, stacked, tells_apart
from msdda_fast.pipelines.stock_forward import replaced, stock_forward

__all__ = ["RowHook"]

logger = logging.getLogger(__name__)


class RowHook:
    """Runs one network for several objectives; kept by a pipeline from call to call.

    Args:
        name: Name of the component in messages.
        network: The component.
        capture: As in `ForwardGraphs`.
    """

    def __init__(self, name: str, network: nn.Module, capture: Capture = "off") -> None:
        self.network = network
        self._name = name
        self._arguments = row_arguments(network)
        self._names = list(inspect.signature(network.forward).parameters)
        self._graphs = ForwardGraphs(name, network, capture)
        # by M: compiled code is for these very objects, and graphs for their addresses
        self._grouped: dict[int, GroupedAdapters] = {}
        self._sets: dict[int, Sequence[AdapterSet]] = {}
        self._is_current = False
        self._verified: set[object] = set()
        self._for_now: set[object] = set()  # until adapters change
        self._one_by_one = False

    @contextmanager
    def hooked(
        self, sets: Sequence[AdapterSet], parallel: ObjectiveParallel | None = None
    ) -> Iterator[None]:
        """Let the network run for the objectives with these adapters inside this context.

        With one objective it is the stock forward with that objective's adapters. A network that no
        objective changes runs once for all, unless its arguments differ between objectives.

        Args:
            sets: The adapters of each objective, M >= 1; those of other networks are passed over.
            parallel: The processes that share the objectives; None: only this one.

        Raises:
            AdapterMismatch: Adapters are merged into the weights.
            CaptureError: Graphs are required and impossible.
            UnsupportedNetwork: The network decides over all rows at once (a cache is enabled).
        """
        held = adapter_names(self.network)
        sets = [tuple(entry for entry in adapters if entry[0] in held) for adapters in sets]
        with ExitStack() as stack:
            switch = stack.enter_context(AdapterSwitch([self.network]))
            if len(sets) == 1 or not any(sets):
                switch.select_set(sets[0])
            stock = stock_forward(self.network)
            forward = functools.partial(stock)
            if len(sets) > 1:
                self._begin(changed=any(sets))
                forward = functools.partial(self._forward, stock, sets, switch)
                if parallel is not None:
                    share = RankShare(parallel, len(sets))
                    switch.select_set(())  # what runs where no objective of this rank has adapters
                    forward = functools.partial(self._shared, share, stock, sets, switch)
            stack.enter_context(replaced(self.network, forward, stock))
            yield

    def _begin(self, *, changed: bool) -> None:
        """Prepare for a call of the pipeline, in which adapters do not change."""
        self._is_current = False
        if getattr(self.network, "is_cache_enabled", False):
            raise UnsupportedNetwork(
                f"a cache is enabled on {self._name!r}, which would decide for all objectives at "
                "once; call disable_cache() on it first"
            )
        weights = self.network.parameters()
        if changed and not self._one_by_one and any(value.is_meta for value in weights):
            self._separate("weights are loaded layer by layer (sequential offloading)")
        if not self._one_by_one:
            self._graphs.begin()

    def _shared(
        self,
        share: RankShare,
        stock: Callable[..., Any],
        sets: Sequence[AdapterSet],
        switch: AdapterSwitch,
        *args: Any,  # noqa: ANN401 - the network's own
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 - the network's own
        """Run this rank's objectives, and return the outputs of all."""
        call = Call.of(self._names, args, kwargs, self._arguments)
        if not any(sets) and not call.differs:
            return stock(*args, **kwargs)
        own = [sets[m] for m in share.own]
        own_args, own_kwargs = share.narrowed(args), share.narrowed(kwargs)
        output = self._forward(stock, own, switch, *own_args, **own_kwargs)
        return share.gathered(output, call)

    def _forward(
        self,
        stock: Callable[..., Any],
        sets: Sequence[AdapterSet],
        switch: AdapterSwitch,
        *args: Any,  # noqa: ANN401 - the network's own
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401 - the network's own
        call = Call.of(self._names, args, kwargs, self._arguments)
        if not any(sets) and not call.differs:
            return stock(*args, **kwargs)

        def one_by_one() -> Any:  # noqa: ANN401 - the network's own
            outputs = []
            for m, adapters in enumerate(sets):
                switch.select_set(adapters)
                own_args, own_kwargs = only(m, args), only(m, kwargs)
                outputs.append(stock(*own_args, **own_kwargs))
            return stacked(outputs)

        if self._one_by_one:
            return one_by_one()
        key = (tuple(map(bool, sets)), call.kind)
        reason: str | None
        try:
            grouped_args, grouped_kwargs = call.repeated(len(sets))
            with self._current(sets).applied():
                if self._is_verified(key):
                    output = self._graphs.run(stock, grouped_args, grouped_kwargs)
                else:
                    output = stock(*grouped_args, **grouped_kwargs)
            output = call.hidden(output, len(sets))
        except (InvalidShape, RuntimeError, ValueError, TypeError, IndexError) as error:
            if self._is_verified(key):
                raise
            reason = f"{type(error).__name__}: {error}"
        else:
            if self._is_verified(key):
                return output
            with without_compiling():
                reference = one_by_one()
            if (reason := disagreement(output, reference)) is None:
                # weak adapters hide rows in another order; others may be loaded in their place
                (self._verified if tells_apart(reference) else self._for_now).add(key)
                return output
        self._separate(reason)
        return one_by_one()

    def _is_verified(self, key: object) -> bool:
        return key in self._verified or key in self._for_now

    def _separate(self, reason: str) -> None:
        self._one_by_one = True
        logger.warning(
            "%s (%s) cannot run all objectives in one forward, they run one after another: %s",
            self._name,
            type(self.network).__name__,
            reason,
        )

    def _current(self, sets: Sequence[AdapterSet]) -> GroupedAdapters:
        grouped = self._grouped.get(len(sets))
        if (
            grouped is None
            or self._sets[len(sets)] != sets
            or not (self._is_current or grouped.is_current())
        ):
            now = GroupedAdapters(self.network, sets)
            if grouped is None or not grouped.take(now):
                grouped = self._grouped[len(sets)] = now
                self._graphs.clear()
            self._sets[len(sets)] = sets
            self._for_now.clear()
        self._is_current = True  # for the rest of the call: asking costs as much as a small layer
        return grouped

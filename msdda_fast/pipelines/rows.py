# SPDX-License-Identifier: Apache-2.0
"""The arguments and the output of one call of a network, as rows of M objectives."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.pipelines.hidden_axis import HiddenAxis, hide, rows_of
from msdda_fast.pipelines.row_arguments import RowArguments
from msdda_fast.torch_private import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["Call", "disagreement", "only", "stacked", "tells_apart"]

#: Largest relative error of a forward for all objectives: rounding grows with depth. Rows in
#: another order are off by as much as two objectives or two prompts differ.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a network.

    Attributes:
        named: Every argument by its name, positional ones first.
        positional: How many of them are positional.
        rows: R, as long as the first argument.
        special: What is special about the arguments of this network.
    """

    named: tuple[tuple[str, Any], ...]
    positional: int
    rows: int
    special: RowArguments

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        special: RowArguments,
    ) -> Call:
        """Name the arguments.

        Args:
            names: Parameters of the network's forward, in order.
            args, kwargs: Of the call.
            special: What is special about them.

        Raises:
            UnsupportedNetwork: There is no argument whose length could be the number of rows.
        """
        named = (*zip(names, args, strict=False), *kwargs.items())
        by_name = dict(named)
        candidates = [by_name[names[0]]] if names[0] in by_name else list(by_name.values())
        for value in candidates:
            if isinstance(value, (Tensor, list)) and (isinstance(value, list) or value.ndim):
                return cls(named, len(args), len(value), special)
        raise UnsupportedNetwork(f"none of the arguments {list(by_name)} has rows")

    @property
    def differs(self) -> bool:
        """Whether an argument differs between objectives."""
        leaves = tree_leaves([value for _, value in self.named])
        return any(isinstance(leaf, HiddenAxis) for leaf in leaves)

    @property
    def kind(self) -> object:
        """What decides how arguments are repeated: equal for calls that differ in sizes only."""
        return tuple((name, self._kind(value)) for name, value in self.named)

    def _kind(self, value: Any) -> object:  # noqa: ANN401 - any argument
        if isinstance(value, Tensor):
            sizes = tuple((size == self.rows, size == 1) for size in value.shape)
            return (isinstance(value, HiddenAxis), sizes)
        if isinstance(value, (list, tuple)):
            return tuple(dict.fromkeys(self._kind(entry) for entry in value))
        if isinstance(value, Mapping):
            return tuple((name, self._kind(entry)) for name, entry in value.items())
        return type(value)

    def repeated(self, objectives: int) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and named arguments with rows for M objectives, objective-major."""
        values = [(name, self._repeat(name, value, objectives)) for name, value in self.named]
        args = [value for _, value in values[: self.positional]]
        return args, dict(values[self.positional :])

    def _repeat(self, name: str, value: Any, m: int) -> Any:  # noqa: ANN401 - any argument
        if name in self.special.lists and isinstance(value, (list, tuple)):
            return type(value)(only(i, entry) for i in range(m) for entry in value)
        if isinstance(value, Tensor):
            axis = self.special.axes.get(name, 0)
            return self._repeat_tensor(name, value.transpose(0, axis), m).transpose(0, axis)
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._repeat(name, entry, m) for entry in value)
        if isinstance(value, dict):
            return {key: self._repeat(key, entry, m) for key, entry in value.items()}
        return value

    def _repeat_tensor(self, name: str, value: Tensor, m: int) -> Tensor:
        if isinstance(value, HiddenAxis):
            return rows_of(value, m)
        if name in self.special.shared or value.ndim == 0:
            return value
        if len(value) == self.rows:
            return rows_of(value, m)
        if len(value) == 1 and value.ndim > 1:  # one entry for all rows, broadcast by the network
            return value.expand(self.rows * m, *value.shape[1:])
        return value

    def hidden(self, output: Any, objectives: int) -> Any:  # noqa: ANN401 - the network's own
        """Hide the objective axis of an output with M R rows.

        Args:
            output: A tensor, a list with one tensor per row, or a nest of either.
            objectives: M.
        """
        total = self.rows * objectives
        if isinstance(output, (list, tuple)) and type(output) in (list, tuple):
            if len(output) == total and isinstance(output[0], Tensor):
                per_row = (torch.stack(list(output[r :: self.rows])) for r in range(self.rows))
                return type(output)(HiddenAxis(part) for part in per_row)
            return type(output)(self.hidden(part, objectives) for part in output)

        def part(value: Tensor) -> Tensor:
            return hide(value, objectives) if value.ndim and len(value) == total else value

        return tree_map_only(Tensor, part, output)


def only(objective: int, arguments: Any) -> Any:  # noqa: ANN401 - any nest
    """Return arguments as objective `objective` sees them."""
    return tree_map_only(HiddenAxis, lambda value: value.stacked[objective], arguments)


def stacked(outputs: Sequence[Any]) -> Any:  # noqa: ANN401 - the network's own
    """Hide the objective axis of the outputs of each objective."""
    flat = [tree_flatten(output) for output in outputs]
    leaves = [
        HiddenAxis(torch.stack(own)) if isinstance(own[0], Tensor) else own[0]
        for own in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])


def disagreement(output: Any, reference: Any) -> str | None:  # noqa: ANN401 - the network's own
    """Say how an output for all objectives differs from their own outputs; None: it does not."""
    pairs = zip(tree_leaves(output), tree_leaves(reference), strict=True)
    for index, (value, own) in enumerate(pairs):
        if not isinstance(own, HiddenAxis):
            continue
        if not isinstance(value, HiddenAxis) or value.shape != own.shape:
            return f"output {index} is {value!r:.80}, expected {own!r}"
        if not (error := _relative(value.stacked, own.stacked)) <= (limit := _tolerance(own)):
            return f"output {index} is off by {error:.1e}, more than {limit:g}"
    return None


def tells_apart(reference: Any) -> bool:  # noqa: ANN401 - the network's own
    """Whether objectives differ by enough for `disagreement` to notice rows in another order."""
    return any(
        all(
            _relative(a, b) > 10 * _tolerance(leaf)
            for a, b in itertools.combinations(leaf.stacked, 2)
        )
        for leaf in tree_leaves(reference)
        if isinstance(leaf, HiddenAxis)
    )


def _tolerance(value: Tensor) -> float:
    return _TOLERANCE.get(value.dtype, _TOLERANCE[torch.float32])


def _relative(value: Tensor, own: Tensor) -> float:
    return float((value - own).double().norm() / own.double().norm())

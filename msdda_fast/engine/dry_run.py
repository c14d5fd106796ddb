# SPDX-License-Identifier: Apache-2.0
"""A step on tensors without data: its operators, its peak memory, and whether it would sync.

This takes host time only, allocates nothing, and finds what would break a capture on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from msdda_fast.errors import CaptureError, MSDDAError
from msdda_fast.torch_private import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    tree_leaves,
    tree_map,
)

__all__ = ["DryRun", "dry_run"]

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class DryRun:
    """The operators and peak memory of one step.

    Attributes:
        operators: Names of the operators in order, views included.
        peak_bytes: Most memory that results of operators hold at one time, without compilation.
    """

    operators: tuple[str, ...]
    peak_bytes: int


def dry_run(advance: Callable[[B], None], buffers: B) -> DryRun:
    """Run `advance` once without data; the buffers do not change.

    Raises:
        CaptureError: It would read a value on the host, derive a shape from values or copy between
            devices; the message names the operator.
    """
    with FakeTensorMode() as fake, _Watch(fake) as watch, torch.no_grad():
        try:
            advance(buffers)
        except MSDDAError:
            raise
        except RuntimeError as error:
            last = watch.operators[-1] if watch.operators else "the first operator"
            raise CaptureError(
                f"the step cannot be captured: {last} does not run without data "
                f"({type(error).__name__}: {error})"
            ) from error
    return DryRun(tuple(watch.operators), watch.peak)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the tensors it meets with fake ones, and counts the memory of results."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []
        self.peak = 0
        self._fake = fake
        self._live = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an overload of an operator
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        inputs = tree_map(self._given, (args, kwargs or {}))
        if func.namespace != "prim":  # questions about a tensor, no work
            self.operators.append(str(func))
        result = func(*inputs[0], **inputs[1])
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._count(tensor)
        self._check_devices(func, inputs, made)
        return result

    def _given(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        fake = value if isinstance(value, FakeTensor) else self._fake.from_tensor(value)
        self._known.add(fake.untyped_storage())  # resident before the step, or counted already
        return fake

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, nbytes: int) -> None:
        self._live -= nbytes

    def _check_devices(self, func: object, inputs: object, made: list[Tensor]) -> None:
        if str(func).startswith(("aten._to_copy", "aten.copy_")):
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            devices = {str(tensor.device) for tensor in (*tensors, *made)}
            if len(devices) > 1:
                raise CaptureError(
                    f"the step cannot be captured: {func} copies between {sorted(devices)}"
                )

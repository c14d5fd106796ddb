# SPDX-License-Identifier: Apache-2.0
"""Predictions of M objectives that look like one: a tensor with a hidden objective axis.

A pipeline's loop does things of its own between network and scheduler: it splits off the guidance
branches, combines and rescales them, casts, mixes in latents. With the objective axis hidden, that
code runs unchanged, once per objective, through `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape, UnsupportedNetwork
from msdda_fast.torch_private import (
    make_wrapper,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
    without_torch_function,
)

__all__ = ["HiddenAxis", "hide", "rows_of"]

#: Attributes and methods that describe a tensor and read no value of it.
_ABOUT = {
    "__get__",  # shape, dtype, device, ndim, requires_grad, ...
    "__hash__",
    "__len__",
    "__repr__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "nelement",
    "numel",
    "size",
    "stride",
}
#: They are attributes, and yet give a tensor of values.
_VALUES = {"T", "mT", "H", "mH", "real", "imag", "data", "grad"}
#: They bring values to Python, where one number would have to stand for M.
_HOST = {
    "equal",
    "allclose",
    "__array__",
    "__bool__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
    "item",
    "numpy",
    "tolist",
}


class HiddenAxis(torch.Tensor):
    """Looks like (R, *S), R rows of one network; holds (M, R, *S), the rows of all objectives.

    Operators on it run once per objective, and so do functions of it and plain tensors, which all
    objectives share.

    Args:
        stacked: (M, R, *S), M >= 1.

    Attributes:
        stacked: As given.
    """

    stacked: Tensor

    @staticmethod
    def __new__(cls: type[HiddenAxis], stacked: Tensor) -> HiddenAxis:
        looks: HiddenAxis = make_wrapper(cls, stacked[0])
        looks.stacked = stacked
        return looks

    def __repr__(self) -> str:  # type: ignore[override]
        return f"HiddenAxis(M={len(self.stacked)}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what `func` returns
        """Run `func` once per objective.

        Raises:
            UnsupportedNetwork: `func` reads values on the host, or cannot run once per objective.
        """
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            about = attribute not in _VALUES
        else:
            about = name in _ABOUT
        if about:
            with without_torch_function():
                return func(*args, **kwargs)
        if name in _HOST:
            raise UnsupportedNetwork(
                f"the pipeline reads a prediction on the host ({name}), where it would need one "
                "value for all objectives; such a pipeline cannot run with several objectives"
            )
        leaves, spec = tree_flatten((args, kwargs))
        hidden = [index for index, leaf in enumerate(leaves) if isinstance(leaf, HiddenAxis)]
        counts = {len(leaves[index].stacked) for index in hidden}
        if len(counts) != 1:
            raise InvalidShape(f"{name} got predictions of {sorted(counts)} objectives")

        def once(*parts: Tensor) -> Any:  # noqa: ANN401 - what `func` returns
            filled = list(leaves)
            for index, part in zip(hidden, parts, strict=True):
                filled[index] = part
            once_args, once_kwargs = tree_unflatten(filled, spec)
            return func(*once_args, **once_kwargs)

        try:
            result = torch.vmap(once, randomness="same")(*(leaves[i].stacked for i in hidden))
        except (RuntimeError, ValueError) as error:
            raise UnsupportedNetwork(
                f"{name} cannot run on predictions of several objectives: {error}"
            ) from error
        return tree_map_only(Tensor, HiddenAxis, result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - never returns
        """Raise: an operator that bypasses `__torch_function__` would see only the looks."""
        raise UnsupportedNetwork(f"{func} cannot run on a prediction of several objectives")


def hide(rows: Tensor, objectives: int) -> HiddenAxis:
    """(M R, ...), objective-major, -> a tensor that looks like (R, ...)."""
    return HiddenAxis(rows.reshape(objectives, -1, *rows.shape[1:]))


def rows_of(value: Tensor, objectives: int) -> Tensor:
    """(R, ...), of one value for all objectives or of a hidden axis, -> (M R, ...).

    Raises:
        InvalidShape: The hidden axis is of another number of objectives.
    """
    if isinstance(value, HiddenAxis):
        if len(value.stacked) != objectives:
            raise InvalidShape(
                f"a prediction of {len(value.stacked)} objectives, expected {objectives}"
            )
        return value.stacked.flatten(0, 1)
    return value.repeat(objectives, *(1,) * (value.ndim - 1))

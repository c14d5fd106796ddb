# SPDX-License-Identifier: Apache-2.0
"""The predictions of M objectives, as a loop hands them to `step`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msdda_fast.errors import InvalidShape

__all__ = ["by_objective"]


def by_objective(model_output: Any, sample: Tensor, count: int) -> list[Tensor | None]:  # noqa: ANN401
    """Return the M predictions, each (1, B, *S), or None where none was made.

    Args:
        model_output: (M, B, *S), or M tensors (B, *S) or None; with M = 1 also (B, *S).
        sample: (B, *S).
        count: M.

    Raises:
        InvalidShape: Not M of them, of another shape than the sample's, or none at all.
    """
    alone = count == 1 and getattr(model_output, "shape", None) == sample.shape
    given: list[Tensor | None] = [model_output] if alone else list(model_output)
    shapes = [None if one is None else tuple(one.shape) for one in given]
    if len(given) != count or not {*shapes} - {None} <= {tuple(sample.shape)}:
        raise InvalidShape(
            f"model_output has {len(given)} predictions of shapes {shapes}, expected M = {count} "
            f"of the sample's, {tuple(sample.shape)}"
        )
    if not any(one is not None for one in given):
        raise InvalidShape("model_output has no prediction: all are None")
    return [None if one is None else one[None] for one in given]

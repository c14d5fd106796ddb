# SPDX-License-Identifier: Apache-2.0
"""Preferences over the steps of a sampler that counts in sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from msdda_fast.errors import InvalidWeights

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule, WeightsLike

__all__ = ["SigmaWeights", "weights_by_step"]

#: A preference for each range of sigma, both ends included.
SigmaRanges: TypeAlias = "Mapping[tuple[float, float], WeightsLike]"
SigmaWeights: TypeAlias = "WeightSchedule | SigmaRanges"


def weights_by_step(weights: SigmaWeights, sigmas: Tensor) -> WeightSchedule:
    """Return preferences with ranges of sigma resolved, and a callable asked once per step.

    Args:
        weights: As in `sample_msdda`.
        sigmas: (T,), where each step begins.

    Raises:
        InvalidWeights: A range is none, or a sigma lies in no range or in two.
    """
    if isinstance(weights, Mapping):
        each = [_of_range(weights, sigma) for sigma in sigmas.tolist()]
    elif callable(weights):
        each = [weights(k) for k in range(len(sigmas))]
    else:
        return weights
    return each.__getitem__


def _of_range(weights: Mapping[Any, Any], sigma: float) -> WeightsLike:
    for given in weights:
        if not _is_range(given):
            raise InvalidWeights(
                f"weights have the key {given!r}, expected ranges (low, high) of sigma with "
                "0 <= low <= high"
            )
    found = [given for given in weights if given[0] <= sigma <= given[1]]
    if len(found) != 1:
        where = "none" if not found else " and ".join(map(str, found))
        raise InvalidWeights(
            f"sigma {sigma:.6g} is sampled and lies in {where} of the ranges of weights, "
            f"{', '.join(map(str, weights))}: it must lie in exactly one"
        )
    preference: WeightsLike = weights[found[0]]
    return preference


def _is_range(given: Any) -> bool:  # noqa: ANN401 - what it is, is the question
    try:
        low, high = given
        return bool(0 <= low <= high)
    except (TypeError, ValueError):
        return False

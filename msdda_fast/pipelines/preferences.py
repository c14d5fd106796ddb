# SPDX-License-Identifier: Apache-2.0
"""What a call prefers, as arguments of `coefficient_table`: weights, strengths and timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape, UnknownObjective
from msdda_fast.objective import Objective
from msdda_fast.steps.strength import check_strength, relative_strength
from msdda_fast.weights import as_host_float64, preference_schedule

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule

__all__ = ["StrengthsLike", "call_strength", "preferences"]

#: A number, one by name (1 for those not named), one of these per prompt, (M,) or (B, M).
StrengthsLike: TypeAlias = float | Mapping[str, float] | Sequence[Any] | Tensor


def preferences(
    objectives: Mapping[str, Objective],
    weights: WeightSchedule,
    strength: StrengthsLike | None,
    kl_weights: Mapping[str, float] | Sequence[float] | None,
    *,
    batch_size: int,
    num_steps: int,
    images_per_prompt: int = 1,
    extrapolate: bool = False,
    timesteps: Tensor | None = None,
) -> dict[str, Any]:
    """Return `weights`, `strength` and `ranges` for `coefficient_table`.

    Args:
        objectives: By name, in order.
        weights: As in `preference_schedule`.
        strength, kl_weights: As in the call of a pipeline.
        batch_size, num_steps: B and T.
        images_per_prompt: How many neighbouring images a prompt has.
        extrapolate: Accept negative weights.
        timesteps: (T,), for weights by ranges of timesteps.

    Raises:
        UnknownObjective: A mapping names an objective that does not exist, or KL weights miss one.
        InvalidShape: Numbers of another shape than those.
        InvalidWeights: Weights off the simplex, a strength that is negative or not finite, or KL
            weights that are not positive.
    """
    names = list(objectives)
    rows = preference_schedule(
        weights,
        names,
        batch_size,
        num_steps,
        images_per_prompt=images_per_prompt,
        extrapolate=extrapolate,
        timesteps=timesteps,
    )
    return {
        "weights": rows,
        "strength": call_strength(names, strength, kl_weights, rows, images_per_prompt),
        "ranges": [objective.timesteps for objective in objectives.values()],
    }


def call_strength(
    names: Sequence[str],
    strength: StrengthsLike | None,
    kl_weights: Mapping[str, float] | Sequence[float] | None,
    weights: Tensor,
    images_per_prompt: int,
) -> Tensor | None:
    """Return strengths, (B, M) or (T, B, M) float64; None: all are 1, which needs no base.

    Args:
        names: Of the objectives, in order.
        strength, kl_weights: As in the call of a pipeline.
        weights: Preferences, (T, B, M).
        images_per_prompt: How many neighbouring images a prompt has.

    Raises:
        UnknownObjective, InvalidShape, InvalidWeights: As `preferences`.
    """
    if strength is None and kl_weights is None:
        return None
    count, batch = len(names), weights.shape[1]
    values = torch.ones(count, dtype=torch.float64)
    if isinstance(strength, Mapping):
        values = _named("strength", names, strength, 1.0)
    elif isinstance(strength, Sequence) and any(isinstance(one, Mapping) for one in strength):
        values = torch.stack([_named("strength", names, one, 1.0) for one in strength])
    elif strength is not None:
        values = as_host_float64(strength, "strength")
    if values.ndim == 2 and len(values) * images_per_prompt == batch:
        values = values.repeat_interleave(images_per_prompt, 0)
    if values.shape not in ((), (count,), (1, count), (batch, count)):
        raise InvalidShape(
            f"strength has shape {tuple(values.shape)}, expected a number, (M,) = ({count},) or "
            f"(B, M) = ({batch}, {count})"
        )
    check_strength(values)
    values = values.expand(batch, count)
    if kl_weights is not None:
        by_name = isinstance(kl_weights, Mapping)
        lambdas: Any = _named("kl_weights", names, kl_weights, None) if by_name else kl_weights
        values = relative_strength(lambdas, weights, values)
    # a table of M objectives: the captured step, and the batch, of requests without strength
    return None if bool((values == 1).all()) else values


def _named(
    argument: str,
    names: Sequence[str],
    given: Any,  # noqa: ANN401 - what it is, is the question
    default: float | None,
) -> Tensor:
    if not isinstance(given, Mapping):
        raise InvalidShape(f"{argument}: give one mapping per prompt, got {given!r:.80} among them")
    known = ", ".join(names)
    if unknown := [name for name in given if name not in names]:
        raise UnknownObjective(f"{argument}: unknown objective {unknown[0]!r}; known: {known}")
    if default is None and (missing := [name for name in names if name not in given]):
        raise UnknownObjective(f"{argument} must name every objective; missing: {missing[0]!r}")
    return as_host_float64([given.get(name, default) for name in names], argument)

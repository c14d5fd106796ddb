# SPDX-License-Identifier: Apache-2.0
"""The preference weights `w` that balance the objectives.

Preference weights are one point of the simplex per sample. Every entry point normalises them here:
a row that sums to 1 within `SUM_TOLERANCE` (float32 and hand-typed values) is accepted, and
renormalised in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape, InvalidWeights, UnknownObjective
from msdda_fast.tracing import values_are_readable
from msdda_fast.weight_ranges import by_timestep, has_ranges

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule, WeightsLike

__all__ = [
    "SUM_TOLERANCE",
    "as_host_float64",
    "normalise_weights",
    "preference_schedule",
    "preference_weights",
]

SUM_TOLERANCE = 1e-3


def normalise_weights(weights: Tensor, *, axis: int, extrapolate: bool = False) -> Tensor:
    """Check that `weights` sum to 1 along `axis` and return them renormalised in float64.

    Values are checked for CPU tensors outside `torch.compile` and FakeTensor tracing; others are
    renormalised without a check.

    Args:
        weights: Any shape, real; objectives along `axis`, no unit.
        axis: The objective axis: 0 in `fast_fuse_step`, -1 everywhere else.
        extrapolate: Accept negative entries.

    Returns:
        Same shape and device, float64, sum 1 along `axis`.

    Raises:
        InvalidWeights: An entry is NaN, infinite or (unless `extrapolate`) negative, or a sum is
            further than `SUM_TOLERANCE` from 1.
    """
    if weights.is_complex() or weights.dtype == torch.bool:
        raise InvalidWeights(f"weights must be real numbers, got dtype {weights.dtype}")
    values = weights.to(torch.float64)  # with its derivatives
    total = values.sum(dim=axis, keepdim=True)
    if values_are_readable(values):
        valid = (total - 1).abs() <= SUM_TOLERANCE  # false when an entry is NaN or infinite
        if not extrapolate:
            valid &= (values >= 0).all(axis, keepdim=True)
        if not valid.all():
            _raise_off_simplex(values.movedim(axis, -1), valid.movedim(axis, -1), extrapolate)
    return values / total


def _raise_off_simplex(rows: Tensor, valid: Tensor, extrapolate: bool) -> None:
    index = (~valid[..., 0]).nonzero()[0].tolist()
    row: list[float] = rows[tuple(index)].tolist()
    where = f" at index {index if len(index) > 1 else index[0]}" if index else ""
    shown = ", ".join(f"{value:.6g}" for value in row)
    sign = "finite" if extrapolate else "finite and not negative"
    hint = "" if extrapolate or all(v >= 0 for v in row) else "; extrapolate=True allows negatives"
    raise InvalidWeights(
        f"weights{where} are [{shown}], which sum to {sum(row):.6g}: they must be {sign}, "
        f"and sum to 1 within {SUM_TOLERANCE:g}{hint}"
    )


def preference_weights(
    weights: WeightsLike,
    objectives: int | Sequence[str],
    batch_size: int,
    *,
    images_per_prompt: int = 1,
    extrapolate: bool = False,
) -> Tensor:
    """Return preference weights as rows `w_b` on the simplex, sum_m w_{b,m} = 1.

    Values are always checked: a CUDA tensor is copied to the host here, once, because tables are
    built there.

    Args:
        weights: None (uniform), a mapping from every objective's name to a number, one such mapping
            per sample, or numbers of shape (M,) or (B, M) in the order of `objectives`; no unit.
        objectives: Their names in order, or their number M.
        batch_size: B, the number of samples.
        images_per_prompt: How many neighbouring samples a prompt has; one mapping per prompt serves
            them all.
        extrapolate: Accept negative entries; whether the fused precision stays positive is checked
            where the etas are known.

    Returns:
        (B, M) float64 on the CPU.

    Raises:
        UnknownObjective: A mapping names an objective that does not exist.
        InvalidWeights: A mapping misses an objective, or the numbers are off the simplex.
        InvalidShape: The numbers have neither shape (M,) nor (B, M).
    """
    names = None if isinstance(objectives, int) else list(objectives)
    count = objectives if isinstance(objectives, int) else len(objectives)
    if weights is None:
        values = torch.full((count,), 1.0 / count, dtype=torch.float64)
    elif isinstance(weights, Mapping):
        values = _mapping_row(weights, names)
    elif _holds_mappings(weights):
        values = torch.stack([_mapping_row(row, names) for row in weights])
        if len(values) * images_per_prompt == batch_size:
            values = values.repeat_interleave(images_per_prompt, 0)
    else:
        values = as_host_float64(weights, "weights")
    if values.shape not in ((count,), (1, count), (batch_size, count)):
        raise InvalidShape(
            f"weights have shape {tuple(values.shape)}, expected ({count},) or "
            f"({batch_size}, {count}): (M,) or (B, M) for {_describe(names, count)}"
        )
    return normalise_weights(values.expand(batch_size, count), axis=-1, extrapolate=extrapolate)


def preference_schedule(
    weights: WeightSchedule,
    objectives: int | Sequence[str],
    batch_size: int,
    num_steps: int,
    *,
    images_per_prompt: int = 1,
    extrapolate: bool = False,
    timesteps: Tensor | None = None,
) -> Tensor:
    """Return the preference weights of every step, `w_t`, in sampling order.

    Args:
        weights: As in `preference_weights`, or numbers of shape (T, B, M), or a callable from the
            step index k = 0..T-1 (in sampling order) to any form of `preference_weights`; or, for
            all samples or for each, a mapping from ranges of timesteps to such forms, see
            `weight_ranges`.
        objectives: Their names in order, or their number M.
        batch_size: B, the number of samples.
        num_steps: T, the number of sampling steps.
        images_per_prompt: As in `preference_weights`.
        extrapolate: Accept negative entries.
        timesteps: (T,), on the training grid, which ranges need.

    Returns:
        (T, B, M) float64 on the CPU; an expanded view when the weights do not depend on k.

    Raises:
        UnknownObjective, InvalidWeights, InvalidShape: As `preference_weights`.
    """
    row = partial(
        preference_weights,
        objectives=objectives,
        batch_size=batch_size,
        images_per_prompt=images_per_prompt,
        extrapolate=extrapolate,
    )
    names = None if isinstance(objectives, int) else list(objectives)
    if has_ranges(weights, names):
        if timesteps is None:
            raise InvalidWeights("weights by ranges of timesteps have no timesteps here")
        weights = by_timestep(weights, timesteps, names)
    if callable(weights):
        return torch.stack([row(weights(k)) for k in range(num_steps)])
    count = objectives if isinstance(objectives, int) else len(objectives)
    if not (weights is None or isinstance(weights, Mapping) or _holds_mappings(weights)):
        weights = as_host_float64(weights, "weights")
    if isinstance(weights, Tensor) and weights.ndim == 3:
        expected = (num_steps, batch_size, count)
        if weights.shape not in (expected, (num_steps, 1, count)):
            raise InvalidShape(
                f"weights have shape {tuple(weights.shape)}, expected (T, B, M) = {expected}"
            )
        return normalise_weights(weights.expand(expected), axis=-1, extrapolate=extrapolate)
    constant = row(cast("WeightsLike", weights))
    return constant.expand(num_steps, *constant.shape)


def as_host_float64(values: Tensor | Sequence[Any] | float, name: str) -> Tensor:
    """Return numbers as a float64 CPU tensor; `name` starts the message of `InvalidShape`."""
    if isinstance(values, Tensor) and (values.is_complex() or values.layout != torch.strided):
        raise InvalidShape(f"{name} are {values.dtype} ({values.layout}), expected real and dense")
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidShape(f"{name}: expected a rectangular array of numbers: {error}") from None


def _holds_mappings(weights: Tensor | Sequence[Any]) -> bool:
    return (
        isinstance(weights, Iterable)
        and not isinstance(weights, Tensor)
        and any(isinstance(row, Mapping) for row in weights)
    )


def _mapping_row(weights: Mapping[str, float], names: Sequence[str] | None) -> Tensor:
    if not isinstance(weights, Mapping):
        raise InvalidWeights(f"weights mix mappings with {weights!r}; give one mapping per sample")
    if names is None:
        raise InvalidWeights(f"weights by name ({', '.join(weights)}) need named objectives")
    if unknown := [name for name in weights if name not in names]:
        raise UnknownObjective(f"unknown objective {unknown[0]!r}; known: {', '.join(names)}")
    if missing := [name for name in names if name not in weights]:
        raise InvalidWeights(
            f"weights {dict(weights)} miss {', '.join(missing)}; name every objective "
            f"({', '.join(names)}): a weight of 0 switches one off"
        )
    return as_host_float64([weights[name] for name in names], "weights")


def _describe(names: Sequence[str] | None, count: int) -> str:
    return f"{count} objectives" if names is None else f"objectives {', '.join(names)}"

# SPDX-License-Identifier: Apache-2.0
"""Objectives, and the preference weights `w` that balance them.

Preference weights are one point of the simplex per sample. Every entry point normalises them here:
a row that sums to 1 within `SUM_TOLERANCE` (float32 and hand-typed values) is accepted, and
renormalised in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from msdda_fast.errors import InvalidSchedule, InvalidShape, InvalidWeights, UnknownObjective

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule, WeightsLike

__all__ = [
    "SUM_TOLERANCE",
    "Objective",
    "as_host_float64",
    "check_eta",
    "is_watched",
    "normalise_weights",
    "preference_schedule",
    "preference_weights",
    "values_are_readable",
]

SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Objective:
    """One aligned model `p_i(x_{t-1} | x_t) = N(mu_i, eta_i^2 v_t I)`.

    Args:
        source: LoRA file, folder or hub id. None, with no `unet`: the base model itself.
        eta: DDIM stochasticity the model was aligned with, in [0, 1]; 1 is DDPM, 0 deterministic.
        scale: Factor on the adapter's update, no unit; 1 is the adapter as trained.
        weight_name: File name inside `source` when it is a folder or hub id.
        subfolder: Folder inside `source`.
        guidance_scale: This objective's classifier-free guidance; None: the one of the call.
        unet: A full network in place of base and adapter.

    Raises:
        InvalidSchedule: `eta` outside [0, 1], or a guidance scale that is not finite.
        ValueError: `scale` is not finite, or both `source` and `unet` are given.
    """

    source: str | Path | None = None
    _: KW_ONLY
    eta: float = 1.0
    scale: float = 1.0
    weight_name: str | None = None
    subfolder: str | None = None
    guidance_scale: float | None = None
    unet: Any = None  # a torch.nn.Module; Any because level 0 knows no networks

    def __post_init__(self) -> None:
        check_eta(self.eta, "Objective")
        if not math.isfinite(self.scale):
            raise ValueError(f"Objective: scale must be finite, got {self.scale!r}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise InvalidSchedule(
                f"Objective: guidance_scale must be finite, got {self.guidance_scale!r}"
            )
        if self.source is not None and self.unet is not None:
            raise ValueError(
                f"Objective: give source (an adapter) or unet (a full network), not both; "
                f"got source={str(self.source)!r} and a unet"
            )

    @classmethod
    def base(cls, eta: float = 1.0) -> Objective:
        """Return the base model as an objective; `eta` in [0, 1]."""
        return cls(eta=eta)

    @property
    def is_base(self) -> bool:
        """Whether this is the base model itself."""
        return self.source is None and self.unet is None


def check_eta(eta: float, owner: str) -> None:
    """Raise `InvalidSchedule` unless `eta` lies in [0, 1]; `owner` starts the message."""
    if not 0.0 <= eta <= 1.0:  # false for NaN too
        raise InvalidSchedule(f"{owner}: eta must lie in [0, 1], got {eta!r}")


def values_are_readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at without a device sync, a graph break or a fake tensor.

    True for plain CPU tensors that nothing traces; FakeTensor and other subclasses say False.
    """
    return tensor.device.type == "cpu" and not is_watched(tensor)


def is_watched(tensor: Tensor) -> bool:
    """Whether someone looks on: `torch.compile`, a tensor subclass or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or _get_current_dispatch_mode() is not None
    )


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
    values = weights.detach().to(torch.float64)
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
    sign = "finite" if extrapolate else "finite, not negative"
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
        extrapolate: Accept negative entries; whether the fused precision stays positive is checked
            where the etas are known.

    Returns:
        (B, M) float64 on the CPU.

    Raises:
        UnknownObjective: A mapping names an objective that is not there.
        InvalidWeights: A mapping misses an objective, or the numbers are off the simplex.
        InvalidShape: Numbers of another shape than (M,) or (B, M).
    """
    names = None if isinstance(objectives, int) else list(objectives)
    count = objectives if isinstance(objectives, int) else len(objectives)
    if weights is None:
        values = torch.full((count,), 1.0 / count, dtype=torch.float64)
    elif isinstance(weights, Mapping):
        values = _mapping_row(weights, names)
    elif _holds_mappings(weights):
        values = torch.stack([_mapping_row(row, names) for row in weights])
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
    extrapolate: bool = False,
) -> Tensor:
    """Return the preference weights of every step, `w_t`, in sampling order.

    Args:
        weights: As in `preference_weights`, or numbers of shape (T, B, M), or a callable from the
            step index k = 0..T-1 (in sampling order) to any form of `preference_weights`.
        objectives: Their names in order, or their number M.
        batch_size: B, the number of samples.
        num_steps: T, the number of sampling steps.
        extrapolate: Accept negative entries.

    Returns:
        (T, B, M) float64 on the CPU; an expanded view when the weights do not depend on k.

    Raises:
        UnknownObjective, InvalidWeights, InvalidShape: As `preference_weights`.
    """
    if callable(weights):
        rows = [
            preference_weights(weights(k), objectives, batch_size, extrapolate=extrapolate)
            for k in range(num_steps)
        ]
        return torch.stack(rows)
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
    constant = preference_weights(weights, objectives, batch_size, extrapolate=extrapolate)
    return constant.expand(num_steps, *constant.shape)


def as_host_float64(values: Tensor | Sequence[Any] | float, name: str) -> Tensor:
    """Return numbers as a float64 CPU tensor; `name` starts the message of `InvalidShape`."""
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidShape(f"{name}: expected a rectangular array of numbers: {error}") from None


def _holds_mappings(weights: Tensor | Sequence[Any]) -> bool:
    return not isinstance(weights, Tensor) and any(isinstance(row, Mapping) for row in weights)


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
            f"({', '.join(names)}), 0 switches one off"
        )
    return as_host_float64([weights[name] for name in names], "weights")


def _describe(names: Sequence[str] | None, count: int) -> str:
    return f"{count} objectives" if names is None else f"objectives {', '.join(names)}"

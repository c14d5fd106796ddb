# SPDX-License-Identifier: Apache-2.0
r"""M adapters over one network -> two tensors per module, with every scale folded in.

Objective m changes the weight W (out, in, *k) of a module to W + s_m B_m A_m, where
s_m = scale_m alpha_m / r_m. This is the only place that turns a scale and an alpha into a factor of
B: files and readers pass both on as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from msdda_fast.errors import AdapterMismatch, InvalidShape
from msdda_fast.lora.adapter import LoraAdapter, LoraFactors

__all__ = ["StackedFactors", "divergent_modules", "stack_adapters"]


@dataclass(frozen=True, slots=True)
class StackedFactors:
    """The factors of M objectives in one module, zeros where an adapter has no such rank.

    Attributes:
        down: A_m, (M, R, in, *k).
        up: s_m B_m, (M, out, R, *1).
    """

    down: Tensor
    up: Tensor


def stack_adapters(
    adapters: Sequence[LoraAdapter | None],
    *,
    scales: Sequence[float] | None = None,
    alphas: Sequence[Mapping[str, float] | None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, StackedFactors]:
    """Stack the factors of M adapters module by module.

    Args:
        adapters: One per objective, in order; None is the base itself.
        scales: One per objective, no unit; None: 1 for all.
        alphas: Per objective, alpha by module path; an adapter or module without one has alpha
            equal to its rank, so that s_m is its scale.
        dtype: Of the result. s_m B_m is computed in float32 (float64 for float64) and cast once.

    Returns:
        By module path, an entry for each module that some adapter changes, on the device of its
        factors. A module without an entry is the base's for every objective.

    Raises:
        AdapterMismatch: Two adapters update one module with different shapes.
        InvalidShape: Not one scale, or alpha mapping, per adapter; or no adapters at all.
    """
    count = len(adapters)
    scales = [1.0] * count if scales is None else scales
    alphas = [None] * count if alphas is None else alphas
    if not len(scales) == len(alphas) == count or count == 0:
        raise InvalidShape(
            f"got {len(scales)} scales and {len(alphas)} alphas for {count} adapters, M >= 1"
        )
    paths = dict.fromkeys(path for adapter in adapters if adapter for path in adapter.factors)
    stacks = {}
    for path in paths:
        entries = [adapter.factors.get(path) if adapter else None for adapter in adapters]
        _check_alike(path, adapters)
        factor = [
            scale * ((alpha or {}).get(path, len(entry.down)) / len(entry.down)) if entry else 0.0
            for entry, scale, alpha in zip(entries, scales, alphas, strict=True)
        ]
        stacks[path] = _stack(entries, factor, dtype)
    return stacks


def _check_alike(path: str, adapters: Sequence[LoraAdapter | None]) -> None:
    holders = [adapter for adapter in adapters if adapter and path in adapter.factors]
    first = holders[0]
    for other in holders[1:]:
        shapes = [adapter.factors[path].update_shape for adapter in (first, other)]
        if shapes[0] != shapes[1]:
            raise AdapterMismatch(
                f"adapters {first.name!r} and {other.name!r} were made for different bases: they "
                f"update {path!r} with shapes {shapes[0]} and {shapes[1]}"
            )


def _stack(
    entries: Sequence[LoraFactors | None], factor: Sequence[float], dtype: torch.dtype
) -> StackedFactors:
    present = [entry for entry in entries if entry]
    like_down, like_up = present[0].down, present[0].up
    rank = max(len(entry.down) for entry in present)
    shape = like_down.shape[1:]
    down = like_down.new_zeros(len(entries), rank, *shape, dtype=dtype)
    up = like_up.new_zeros(len(entries), len(like_up), rank, *like_up.shape[2:], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for m, entry in enumerate(entries):
        if entry:
            down[m, : len(entry.down)] = entry.down
            up[m, :, : len(entry.down)] = factor[m] * entry.up.to(wide)
    return StackedFactors(down, up)


def divergent_modules(stacks: Mapping[str, StackedFactors]) -> set[str]:
    """Paths where two objectives have different factors: up to the first, rows can be shared.

    Two adapters with different factors of one product count as different.
    """
    return {
        path
        for path, stacked in stacks.items()
        if any(bool((t != t[:1]).any()) for t in (stacked.down, stacked.up))
    }

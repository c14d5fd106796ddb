# SPDX-License-Identifier: Apache-2.0
r"""Several adapters merged into one (Rewarded Soups), in two senses of averaged weights.

    product:  DeltaW = sum_i w_i s_i B_i A_i,
    factor:   DeltaW = (sum_i w_i s_i B_i) (sum_i w_i A_i).

The first averages the networks. The second averages all tensors of the adapters' files: each
update counts w_i^2, and unrelated factors are multiplied with each other. An update does not
determine its factors: (B, A) and (B Q^T, Q A) are the same update, but merge differently. Over
Haar-random rotations Q of every adapter but one, the factor merge of two is in expectation

    E DeltaW = (1 - w)^2 B_1 A_1 + w^2 B_2 A_2:

the cross terms w (1 - w) (B_1 Q A_2 + B_2 Q^T A_1) are odd in Q. At w = 1/2 half of what the
product merge keeps of each update is left, and the rest is noise, of squared norm

    w^2 (1 - w)^2 (|B_1|^2 |A_2|^2 + |B_2|^2 |A_1|^2 + 2 <B_1 A_1, B_2 A_2>) / rank.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from msdda_fast.errors import AdapterMismatch
from msdda_fast.lora.adapter import LoraFactors
from msdda_fast.lora.stack import StackedFactors

__all__ = ["Merge", "merge_adapters"]

Merge: TypeAlias = Literal["product", "factor"]

Stacks: TypeAlias = Mapping[str, StackedFactors]


def merge_adapters(
    adapters: Mapping[str, Stacks],
    weights: Sequence[float],
    merge: Merge,
    rotation: int | None = None,
) -> dict[str, LoraFactors]:
    """Merge adapters of one network into the factors of one adapter with scale 1.

    Args:
        adapters: By name, factors by module path as stacks of M = 1, with s_i = scale alpha / rank
            folded in; see `stack_adapters`. An adapter without entries is the base.
        weights: w_i, one per adapter, no unit.
        merge: "product" adds the ranks of a module; "factor" needs equal modules and ranks.
        rotation: Seed of random rotations Q of the factors of all adapters but the first, which
            change no adapter; None: the factors as they are. Only for "factor".

    Returns:
        Factors by module path in the dtype of the stacks, padded with zeros to one rank.

    Raises:
        AdapterMismatch: With "factor", a module is not changed by all adapters at one rank.
        ValueError: `merge` is unknown, or a rotation is given for "product".
    """
    if merge not in ("product", "factor"):
        raise ValueError(f"merge must be 'product' or 'factor', got {merge!r}")
    if rotation is not None and merge == "product":
        raise ValueError("merge='product' depends on no rotation of the factors")
    draws = None if rotation is None else torch.Generator().manual_seed(rotation)
    paths = dict.fromkeys(path for stacks in adapters.values() for path in stacks)
    merged = {}
    for path in paths:
        if merge == "factor":
            _check_alike(path, adapters)
        parts = [
            (weight, stacks[path].down[0], stacks[path].up[0])
            for weight, stacks in zip(weights, adapters.values(), strict=True)
            if path in stacks
        ]
        if draws is not None:
            parts[1:] = [(weight, *_rotated(down, up, draws)) for weight, down, up in parts[1:]]
        if merge == "product":
            down = torch.cat([down for _, down, _ in parts])
            up = torch.cat([weight * up for weight, _, up in parts], dim=1)
        else:
            down = torch.stack([weight * down for weight, down, _ in parts]).sum(0)
            up = torch.stack([weight * up for weight, _, up in parts]).sum(0)
        merged[path] = LoraFactors(down, up)
    rank = max((len(factors.down) for factors in merged.values()), default=0)
    return {path: _padded(factors, rank) for path, factors in merged.items()}


def _rotated(down: Tensor, up: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (Q A, B Q^T) for a Haar-random orthogonal Q: the same update from other factors."""
    rank = len(down)
    q, r = torch.linalg.qr(torch.randn(rank, rank, generator=draws, dtype=torch.float64))
    q = (q * r.diagonal().sign()).to(down)  # without the signs it would not be uniform
    return q @ down, up @ q.T


def _check_alike(path: str, adapters: Mapping[str, Stacks]) -> None:
    ranks = {name: s[path].down.shape[1] if path in s else 0 for name, s in adapters.items()}
    if len(set(ranks.values())) > 1:
        raise AdapterMismatch(
            f"merge='factor' needs factors of equal rank, and in {path!r} the ranks are {ranks}; "
            f"merge='product' accepts any"
        )


def _padded(factors: LoraFactors, rank: int) -> LoraFactors:
    missing = rank - len(factors.down)
    return LoraFactors(_pad(factors.down, 0, missing), _pad(factors.up, 1, missing))


def _pad(tensor: Tensor, axis: int, missing: int) -> Tensor:
    # `pad` counts axes from the last one
    return functional.pad(tensor, (*(0, 0) * (tensor.ndim - 1 - axis), 0, missing))

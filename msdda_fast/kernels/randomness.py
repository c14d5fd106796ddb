# SPDX-License-Identifier: Apache-2.0
"""Sources of noise: at most one is given, and generators are drawn in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.types import GeneratorLike

__all__ = ["check_one_source", "draw"]


def check_one_source(**sources: object) -> None:
    """Raise `ValueError` if more than one source of noise is given (not None)."""
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        *others, last = sources
        raise ValueError(
            f"give at most one of {', '.join(others)} and {last}, got {' and '.join(given)}"
        )


def draw(
    shape: Sequence[int],
    generator: GeneratorLike | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normal noise (B, *S) in the order, shape and dtype of diffusers' `randn_tensor`.

    Args:
        shape: (B, *S).
        generator: One for the batch, one per sample, or None: torch's default one.
        device: Of the result; a generator draws on its own device.
        dtype: Of the draws.

    Raises:
        InvalidShape: Not one generator per sample.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise InvalidShape(f"got {len(generator)} generators for {shape[0]} samples")
        rows = [draw((1, *shape[1:]), one, device, dtype) for one in generator]
        return torch.cat(rows)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidShape(
            f"generator must be a torch.Generator or one per sample, got {generator!r:.80}"
        )
    where = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)

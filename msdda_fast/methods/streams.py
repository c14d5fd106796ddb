# SPDX-License-Identifier: Apache-2.0
"""Streams of counter noise that belong to methods, one per particle of each purpose."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from msdda_fast.kernels.counter_noise import as_seeds, counter_noise

__all__ = ["chances", "stream_of"]

#: From here on; those before are the samplers' own.
_FIRST, _MOST_PARTICLES = 16, 1 << 16


def stream_of(purpose: int, particle: int = 0) -> int:
    """Return the stream of a particle."""
    return _FIRST + _MOST_PARTICLES * purpose + particle


def chances(seeds: Sequence[int], k: int, purpose: int) -> Tensor:
    """Return one random number in (0, 1) per seed for a choice at step k, (B,) float64 on the host.

    Like all counter noise it is a function of the seed alone.
    """
    count, host = len(seeds), torch.device("cpu")
    z = counter_noise(
        as_seeds(list(seeds), count, host), (count, 1), step=k, stream=stream_of(purpose)
    )
    uniform: Tensor = torch.special.ndtr(z.double()[:, 0])
    return uniform

# SPDX-License-Identifier: Apache-2.0
"""Counter noise in C++ on the CPU: the bits of `_eager.py`, vectorised."""

import torch
from torch import Tensor

from msdda_fast import _C
from msdda_fast.kernels import native

__all__ = ["run"]


def run(out: Tensor, seeds: Tensor, step: int | Tensor, stream: int) -> None:
    """Fill contiguous `out` (B, C, ...) with the noise of `seeds` (B,)."""
    _C.counter_noise(
        native.array(out),
        (seeds.data_ptr(), int(step), stream),
        native.sizes(out),
        torch.get_num_threads(),
    )

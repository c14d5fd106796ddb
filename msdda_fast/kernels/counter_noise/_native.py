# SPDX-License-Identifier: Apache-2.0
"""Counter noise in C++ on the CPU and CUDA C++ on the GPU: the bits of `_eager.py`."""

import torch
from torch import Tensor

from msdda_fast import _C
from msdda_fast.kernels import native

__all__ = ["run"]


def run(out: Tensor, seeds: Tensor, step: int | Tensor, stream: int) -> None:
    """Fill contiguous `out` (B, C, ...) with the noise of `seeds` (B,)."""
    if out.device.type == "cuda":
        return run_cuda(out, seeds, step, stream)
    _C.counter_noise(
        native.array(out),
        (seeds.data_ptr(), int(step), stream),
        native.sizes(out),
        torch.get_num_threads(),
    )


def run_cuda(out: Tensor, seeds: Tensor, step: int | Tensor, stream: int) -> None:
    """Do the same on the GPU, which reads a step tensor itself."""
    _C.cuda_counter_noise(
        native.strided(out),
        (seeds.data_ptr(), stream),
        native.counter(step),
        native.sizes(out),
        native.queue(out),
    )

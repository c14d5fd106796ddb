# SPDX-License-Identifier: Apache-2.0
"""Which attention backend runs for a shape: on CUDA the fastest, timed before a capture.

No backend is the fastest for every head size, length and batch. As with cuDNN's convolutions, a
shape is timed once, where `torch.backends.cudnn.benchmark` is on; the engine switches it on while
it warms a graph up. Nothing is timed in a capture. On the CPU, under `torch.compile` and for fake
tensors, and where torch is to be deterministic, attention is what it was without this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from msdda_fast.torch_private import keep_busy
from msdda_fast.tracing import is_watched

__all__ = ["attention", "chosen_backend"]

CANDIDATES = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
#: The type of device on which backends are timed.
DEVICE = "cuda"
#: Each backend is timed so often, and so many calls at a time.
ROUNDS, CALLS = 5, 4
#: 1 ms at 2 GHz, more than the host takes to launch `CALLS` of the slowest to launch.
BUSY_CYCLES = 2_000_000


@dataclass(frozen=True, slots=True)
class _Call:
    """What a backend's time depends on; some refuse strides that others take."""

    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: torch.device


#: The fastest backend of each call; None: every candidate refused.
_chosen: dict[_Call, SDPBackend | None] = {}


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention, softmax(q k^T / sqrt(d)) v, on the backend that was the fastest for this shape.

    Where none was timed it runs on those that are enabled.

    Args:
        query: (rows, heads, L, d).
        key, value: (rows, heads, S, d).

    Returns:
        (rows, heads, L, d).
    """
    backend = chosen_backend(query, key, value)
    if backend is None:
        return functional.scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(query, key, value)


def chosen_backend(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend | None:
    """Return the fastest backend for these tensors, timed now if that is allowed; None: none was.

    The tensors are those of `attention`; only their shapes, strides, dtype and device matter.
    """
    if query.device.type != DEVICE or is_watched(query) or _is_deterministic():
        return None
    tensors = query, key, value
    call = _Call(
        tuple(tensor.shape for tensor in tensors),
        tuple(tensor.stride() for tensor in tensors),
        query.dtype,
        query.device,
    )
    may_time = torch.backends.cudnn.benchmark and not torch.cuda.is_current_stream_capturing()
    if call not in _chosen and may_time:
        _chosen[call] = _fastest(query, key, value)
    return _chosen.get(call)


def _is_deterministic() -> bool:
    """Whether two runs shall not differ by a choice that was timed."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


def _fastest(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend | None:
    def run() -> None:
        functional.scaled_dot_product_attention(query, key, value)

    times: dict[SDPBackend, float] = {}
    for backend in CANDIDATES:
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # torch warns of every reason, and then raises
                times[backend] = _milliseconds(run, query.device)
        except RuntimeError:
            continue  # it does not run this shape here
    return min(times, key=times.__getitem__, default=None)


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """Time of the GPU for `CALLS` runs, without that of the host, which a graph does not spend."""
    times: list[float] = []
    with torch.cuda.device(device):
        run()  # its first call chooses kernels and allocates
        for _ in range(ROUNDS):
            start, end = _event(), _event()
            keep_busy(BUSY_CYCLES)  # all is queued before the first of it runs
            start.record()
            for _ in range(CALLS):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

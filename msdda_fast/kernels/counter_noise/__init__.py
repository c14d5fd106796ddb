# SPDX-License-Identifier: Apache-2.0
"""Noise that is a pure function of (seed, step, position): nothing else in the batch can change it.

`kernels.raw` declares the raw function of each backend.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from msdda_fast.errors import InvalidShape
from msdda_fast.integers import as_integer
from msdda_fast.kernels import registry
from msdda_fast.kernels.library import as_tensor, register_in_place
from msdda_fast.tracing import is_watched, values_are_readable
from msdda_fast.types import SeedsLike

__all__ = ["STREAM_INITIAL", "STREAM_STEP", "as_seeds", "as_step", "counter_noise", "seed_list"]

STREAM_INITIAL = 0
STREAM_STEP = 1

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_seeds(seeds: SeedsLike, batch_size: int, device: torch.device) -> Tensor:
    """Seeds as an int64 tensor (B,) on `device`: their 64 bits in two's complement.

    Raises:
        InvalidShape: There are not `batch_size` seeds.
        ValueError: A seed is not an integer of 64 bits, signed or unsigned.
    """
    if not isinstance(seeds, Tensor):
        values = [seed - 2**64 if seed >= 2**63 else seed for seed in seed_list(seeds)]
        seeds = torch.tensor(values, dtype=torch.int64, device=device)
    if seeds.dtype != torch.int64:
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
            raise ValueError(f"seeds must be integers, got {seeds.dtype}")
        seeds = seeds.to(torch.int64)  # uint64 keeps its bits
    if seeds.layout != torch.strided:
        raise InvalidShape(f"seeds has layout {seeds.layout}, expected a dense tensor")
    if seeds.is_meta and device.type != "meta":
        raise InvalidShape(f"seeds is on meta, which holds no values, expected {device}")
    if seeds.shape != (batch_size,):
        raise InvalidShape(f"seeds have shape {tuple(seeds.shape)}, expected ({batch_size},)")
    return seeds.to(device).contiguous()


def seed_list(seeds: SeedsLike) -> list[int]:
    """Seeds, (B,) of Python, numpy or torch, as a list of B ints.

    Raises:
        InvalidShape: `seeds` are not one after another.
        ValueError: A seed is not an integer of 64 bits, signed or unsigned.
    """
    listed = seeds.tolist() if hasattr(seeds, "tolist") else seeds  # numpy's; torch's
    if not isinstance(listed, Iterable):
        raise InvalidShape(f"seeds must be one integer per sample, (B,), got {seeds!r}")
    values = []
    for seed in listed:
        value = as_integer(seed)
        if value is None or not -(2**63) <= value < 2**64:
            raise ValueError(f"a seed must be an integer in [-2^63, 2^64), got {seed!r}")
        values.append(value)
    return values


def as_step(step: int | Tensor) -> int | Tensor:
    """Check a step index k: an int in [0, 2^32), or a 0-d int64 tensor.

    The value of a tensor is checked on the host only, and not under a tracer.
    """
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.ndim != 0:
            raise InvalidShape(
                f"step must be an int or a 0-d int64 tensor, got {step.dtype} {tuple(step.shape)}"
            )
        if values_are_readable(step):
            if step.untyped_storage().nbytes() == 0:
                raise InvalidShape("step has no memory: its storage was freed")
            _check_word("step", int(step))
        return step
    return _check_word("step", step)


def _check_word(name: str, value: int) -> int:
    word = as_integer(value)
    if word is None or not 0 <= word < 2**32:
        raise ValueError(f"{name} must be an integer in [0, 2^32), got {value!r}")
    return word


def counter_noise(
    seeds: SeedsLike,
    shape: Sequence[int],
    *,
    step: int | Tensor = 0,
    stream: int = STREAM_STEP,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    r"""Standard normal noise z = BoxMuller(Philox4x32-10(seed; pixel, channel // 4, step, stream)).

    Sample b depends on `seeds[b]` alone. The same arguments give the same float32 bits on every
    backend and machine; other dtypes are that value, rounded or widened.

    Args:
        seeds: One 64-bit seed per sample, B integers or an int64 tensor (B,).
        shape: Shape (B, *S) of the noise; the first axis of S is the channel, the rest the pixel.
        step: Step index k in sampling order in [0, 2^32), an int or a 0-d int64 tensor.
        stream: STREAM_INITIAL (0) for x_T, STREAM_STEP (1) for step noise; others are reserved.
        device: Where to draw; by default the device of `seeds`, or the CPU.
        dtype: float32, float64, bfloat16 or float16.
        backend: "auto", "eager", "native" or "triton".

    Returns:
        Noise of `shape`, no unit, contiguous.

    Raises:
        InvalidShape: `shape` has no channel axis, or does not match the number of seeds.
        ValueError: A seed, step, stream or dtype is out of range.
        BackendUnavailable: The named backend cannot run on the device.
    """
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 0:
        raise InvalidShape(f"shape must be (B, C, ...), got {shape}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype}")
    stream = _check_word("stream", stream)
    if device is None:
        device = seeds.device if isinstance(seeds, Tensor) else "cpu"
    out = torch.empty(shape, dtype=dtype, device=device)
    seeds = as_seeds(seeds, shape[0], out.device)
    step = as_step(step)
    if backend != "eager" and is_watched(out):
        torch.ops.msdda_fast.counter_noise_(out, seeds, as_tensor(step, out), stream, backend)
    else:
        _run(out, seeds, step, stream, backend)
    return out


def _run(out: Tensor, seeds: Tensor, step: int | Tensor, stream: int, backend: str) -> None:
    registry.resolve("counter_noise", backend, out.device.type).run(out, seeds, step, stream)


register_in_place(
    "counter_noise_", "Tensor(a!) out, Tensor seeds, Tensor step, int stream, str backend", _run
)

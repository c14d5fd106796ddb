# SPDX-License-Identifier: Apache-2.0
"""Compare every backend that can run here with eager on a small case, for `doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.errors import BackendUnavailable
from msdda_fast.kernels import registry

if TYPE_CHECKING:  # mypy compares the signatures of the backends with the declared ones
    from msdda_fast.kernels.counter_noise import _eager as noise_eager
    from msdda_fast.kernels.counter_noise import _native as noise_native
    from msdda_fast.kernels.counter_noise import _triton as noise_triton
    from msdda_fast.kernels.fused_step import _eager, _native, _native_cuda, _ops, _triton
    from msdda_fast.kernels.group_norm import _eager as norm_eager
    from msdda_fast.kernels.grouped_lora import _eager as lora_eager
    from msdda_fast.kernels.raw import (
        CounterNoiseBackend,
        FusedStepBackend,
        GroupedLoraBackend,
        GroupNormBackend,
        RowwiseBackend,
    )
    from msdda_fast.kernels.rowwise import _eager as rowwise_eager

    _FUSED_STEP: tuple[FusedStepBackend, ...] = (_eager, _native, _native_cuda, _triton)
    _OPERATORS: FusedStepBackend = _ops.Operators("auto")
    _COUNTER_NOISE: tuple[CounterNoiseBackend, ...] = (noise_eager, noise_native, noise_triton)
    # those of Triton are operators, without a signature
    _GROUPED_LORA: GroupedLoraBackend = lora_eager
    _GROUP_NORM: GroupNormBackend = norm_eager
    _ROWWISE: RowwiseBackend = rowwise_eager

__all__ = ["report"]

_SHAPE = (2, 5, 9, 7)


def report(device_type: str) -> dict[str, dict[str, str]]:
    """Return, by operator and backend, whether it runs here and how close it is to eager.

    Args:
        device_type: "cpu" or "cuda", on which small cases are run.
    """
    operators: dict[str, Callable[[str, str], Tensor]] = {
        "fused_step": _fused_step,
        "counter_noise": _counter_noise,
        "grouped_lora": _grouped_lora,
        "group_norm": _group_norm,
        "rowwise": _rowwise,
    }
    return {
        name: {
            backend: _finding(name, backend, device_type, run)
            for backend in registry.NAMES
            if registry.has(name, backend)
        }
        for name, run in operators.items()
    }


def _finding(op: str, backend: str, device_type: str, run: Callable[[str, str], Tensor]) -> str:
    chosen = "selected by auto; " if registry.chosen(op, device_type) == backend else ""
    if backend == "eager":
        return f"{chosen}plain torch, the reference for the others"
    try:
        # on the CPU eager is the definition, on a GPU it may contract products and sums
        expected, got = run("eager", "cpu"), run(backend, device_type).cpu()
    except BackendUnavailable as error:
        return f"unavailable: {str(error).partition('cannot run: ')[2] or error}"
    except Exception as error:  # a driver or compiler of any kind; doctor reports, never fails
        return f"failed: {type(error).__name__}: {error}"
    if torch.equal(got, expected):
        return f"{chosen}bit-identical to eager"
    off = float((got.double() - expected.double()).norm() / expected.double().norm())
    if off < 1e-5:
        return f"{chosen}within {off:.0e} of eager, relative"
    return f"WRONG: {off:.1e} off eager, relative; please report this"


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _fused_step(backend: str, device: str) -> Tensor:
    rows, x = _normal(2, 6).to(device), _normal(*_SHAPE).to(device)
    outputs = [_normal(2, *_SHAPE).to(device) for _ in range(2)]
    out = torch.empty_like(x)
    run = registry.resolve("fused_step", backend, device).run
    run(out, x, outputs, rows, step=3, seeds=torch.tensor([1, 2], device=device))
    return out


def _counter_noise(backend: str, device: str) -> Tensor:
    out = torch.empty(_SHAPE, device=device)
    seeds = torch.tensor([1, 2], device=device)
    registry.resolve("counter_noise", backend, device).run(out, seeds, 3, 1)
    return out


def _grouped_lora(backend: str, device: str) -> Tensor:
    x, weight, bias = _normal(2, 32, 64), _normal(48, 64), _normal(48)
    down, up = _normal(2, 4, 64), _normal(2, 48, 4)
    run = registry.resolve("grouped_lora", backend, device).run
    y: Tensor = run(*(t.to(device) for t in (x, weight, bias, down, up)))
    return y


def _group_norm(backend: str, device: str) -> Tensor:
    x = _normal(2, 20, 5, 7).contiguous(memory_format=torch.channels_last)
    weight, bias, shift = _normal(20), _normal(20), _normal(2, 20)
    run = registry.resolve("group_norm", backend, device).run
    x, weight, bias, shift = (t.to(device) for t in (x, weight, bias, shift))
    return run(x, weight, bias, 4, 1e-5, shift, True)


def _rowwise(backend: str, device: str) -> Tensor:
    a, b, bias = (t.to(device) for t in (_normal(6, 40), 2 * _normal(6, 40), _normal(40)))
    rows = registry.resolve("rowwise", backend, device)
    total, normed = rows.sum_and_norm(a, b, bias, bias, a[0], 1e-5)
    return torch.cat([total, normed, rows.sum_of(a, normed, None), rows.geglu(total).repeat(1, 2)])

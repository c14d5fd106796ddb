# SPDX-License-Identifier: Apache-2.0
"""Checks at the door of the fused step: everything is refused here, by name, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from msdda_fast.errors import BackendUnavailable, InvalidShape
from msdda_fast.kernels import registry
from msdda_fast.kernels.counter_noise import as_seeds, as_step
from msdda_fast.kernels.fused_step._memory import apart, check_distinct, readable
from msdda_fast.kernels.fused_step._ops import Operators
from msdda_fast.kernels.randomness import check_one_source, draw
from msdda_fast.kernels.raw import FusedStepBackend
from msdda_fast.torch_private import has_tangent, in_function_transform, is_batched
from msdda_fast.tracing import is_watched
from msdda_fast.types import GeneratorLike, SeedsLike

__all__ = [
    "Randomness",
    "by_objective",
    "check_alike",
    "check_out",
    "check_pixels",
    "check_tensor",
    "compute_dtype",
    "pick",
    "randomness",
]

T = TypeVar("T")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Randomness(NamedTuple):
    """The noise of one step: a tensor (B, *S), or seeds (B,) and the step that counts."""

    noise: Tensor | None
    seeds: Tensor | None
    step: int | Tensor

    def readable(self) -> Randomness:
        """The same, as kernels read it; see `_memory.readable`."""
        return Randomness(
            None if self.noise is None else readable(self.noise, "noise"),
            None if self.seeds is None else readable(self.seeds, "seeds"),
            self.step,
        )


def randomness(
    like: Tensor,
    noise: Tensor | None,
    seeds: SeedsLike | None,
    step: int | Tensor,
    generator: GeneratorLike | None,
) -> Randomness:
    """At most one of `noise`, `seeds`, `generator`; none: torch's default generator.

    Raises:
        ValueError: more than one is given.
        InvalidShape: `noise`, or the number of seeds or generators, does not fit `like` (B, *S).
    """
    check_one_source(noise=noise, seeds=seeds, generator=generator)
    step = as_step(step)
    if noise is not None:
        check_alike(noise, "noise", like.shape, like.device)
        return Randomness(noise, None, step)
    if seeds is not None:
        if like.ndim < 2:
            raise InvalidShape(f"seeds need samples with a channel axis, got {tuple(like.shape)}")
        return Randomness(None, as_seeds(seeds, len(like), like.device), step)
    return Randomness(draw(like.shape, generator, like.device, like.dtype), None, step)


def by_objective(tensors: Tensor | Sequence[T], name: str) -> list[Tensor | T]:
    """The slices of a tensor along its first axis, or the entries of a sequence."""
    if isinstance(tensors, (list, tuple)):
        return list(tensors)
    if not isinstance(tensors, Tensor):
        raise InvalidShape(f"{name} must be a tensor or a list of tensors, got {_kind(tensors)}")
    if tensors.ndim == 0:
        raise InvalidShape(f"{name} has shape (), expected an objective axis M first")
    if tensors.layout != torch.strided:
        raise InvalidShape(f"{name} has layout {tensors.layout}, expected a dense tensor")
    return list(tensors.unbind())


def check_tensor(value: object, name: str) -> None:
    """Raise `InvalidShape` unless `value` is a tensor: numpy's arrays have shapes, too."""
    if not isinstance(value, Tensor):
        raise InvalidShape(f"{name} must be a tensor, got {_kind(value)}")


def check_alike(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise `InvalidShape` unless `tensor` has this shape, device and float dtype (None: any)."""
    check_tensor(tensor, name)
    if tensor.shape != shape:
        raise InvalidShape(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.device != device:
        raise InvalidShape(f"{name} is on {tensor.device}, expected {device}")
    if tensor.layout != torch.strided:
        raise InvalidShape(f"{name} has layout {tensor.layout}, expected a dense tensor")
    if tensor.dtype not in (FLOATS if dtype is None else (dtype,)):
        accepted = dtype or ", ".join(str(d) for d in FLOATS)
        raise InvalidShape(f"{name} has dtype {tensor.dtype}, expected {accepted}")


def check_out(
    out: Tensor | None, like: Tensor, inputs: Sequence[Tensor | None], *, addresses: bool
) -> Tensor:
    """Where to write the result: `out`, or a new tensor with shape, dtype and layout of `like`.

    A new one also where `out` overlaps the inputs; see `apart`. `addresses`: tensors have some.
    """
    if out is None:
        return torch.empty_like(like, requires_grad=False)
    check_alike(out, "out", like.shape, like.device)
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad; steps do not differentiate through out")
    if not addresses:
        return out
    check_distinct(out)
    return apart(out, inputs)


def check_pixels(weights: Tensor, sample: Tensor) -> None:
    """Raise `InvalidShape` unless weights (M, B, *S) of every pixel fit the sample (B, *S)."""
    given, expected = weights.shape[1:], sample.shape
    if (
        len(given) != len(expected)
        or any(n not in (1, axis) for n, axis in zip(given[1:], expected[1:], strict=True))
        or given[0] != expected[0]
    ):
        raise InvalidShape(
            f"weights of every pixel have shape {(given[0], len(weights), *given[1:])}, expected "
            f"(B, M, *S) for x_t (B, *S) = {tuple(expected)}, each axis of S as there or 1"
        )


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of the inputs is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def pick(backend: str, inputs: Sequence[Tensor | None]) -> FusedStepBackend:
    """The backend for these inputs: its module, or operators under a tracer.

    Raises:
        BackendUnavailable: The backend cannot run; or it is not "eager", and an input requires grad
            or has a tangent, or `torch.func` transforms the call.
        InvalidShape: `vmap` maps over an input, and not over the first.
    """
    tensors = [tensor for tensor in inputs if tensor is not None]
    if backend != "eager" and (in_function_transform() or has_tangent(tensors)):
        raise BackendUnavailable(
            f"backend {backend!r} has no derivatives, and forward-mode differentiation or another "
            'transform of torch.func is under way; use backend="eager", which can be transformed'
        )
    maps = not torch.compiler.is_compiling() and any(map(is_batched, tensors[1:]))
    if maps and not is_batched(tensors[0]):
        raise InvalidShape(
            "vmap maps over other inputs than the first (means or x_t), which the result is like; "
            "map over that one too, expanded"
        )
    if backend != "eager" and torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in tensors):
            raise BackendUnavailable(
                f"backend {backend!r} is for inference only and an input requires grad; "
                'use backend="eager", which differentiates, or torch.no_grad()'
            )
    if backend != "eager" and is_watched(tensors[0]):
        return Operators(backend)
    return registry.resolve("fused_step", backend, tensors[0].device.type)

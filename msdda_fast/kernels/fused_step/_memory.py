# SPDX-License-Identifier: Apache-2.0
"""What kernels that take addresses must know of memory: is it there, whose is it, as is it read.

Nothing of it is asked under a tracer or a function transform, where tensors have no addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from msdda_fast.errors import InvalidShape
from msdda_fast.torch_private import in_function_transform
from msdda_fast.tracing import is_watched

__all__ = ["apart", "check_distinct", "finish", "has_address", "readable"]


def has_address(tensor: Tensor) -> bool:
    """Whether this tensor, and so its peers, may be asked for an address."""
    return not is_watched(tensor) and not in_function_transform()


def readable(tensor: Tensor, name: str) -> Tensor:
    """Return the values of a dense tensor without a negative bit, which kernels do not see.

    Raises:
        InvalidShape: Its storage was freed or made smaller.
    """
    _check_storage(tensor, name)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def check_distinct(out: Tensor) -> None:
    """Check that `out` can be written.

    Raises:
        InvalidShape: It has a negative bit, a storage that was freed, or elements that share memory
            (as far as strides tell: none of torch's slices and permutations do).
    """
    _check_storage(out, "out")
    if out.is_neg():
        raise InvalidShape("out is a negated view; give out.resolve_neg(), or another tensor")
    if out.is_contiguous():
        return
    reach = 0  # of the axes with smaller strides
    for stride, n in sorted(zip(out.stride(), out.shape, strict=True)):
        if n > 1 and stride <= reach:
            raise InvalidShape(f"out has strides {out.stride()}: elements share their memory")
        reach += (n - 1) * stride


def apart(out: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
    """Return `out`, or a new tensor if writing to it would change what is still to be read.

    An input that *is* `out`, element by element, is read before it is written.
    """
    start, end = _extent(out)
    for tensor in inputs:
        if tensor is None:
            continue
        first, last = _extent(tensor)
        if first < end and start < last:
            layout = (tensor.dtype, tensor.shape, tensor.stride())
            if first != start or layout != (out.dtype, out.shape, out.stride()):
                return torch.empty_like(out, requires_grad=False)
    return out


def finish(result: Tensor, out: Tensor | None) -> Tensor:
    """Return `result`, in `out` if one was given, which autograd then knows to have changed."""
    if out is None:
        return result
    if result is not out:
        out.copy_(result)
    elif not torch.compiler.is_compiling():
        increment_version(out)  # kernels write to addresses, of which torch knows nothing
    return out


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    start = tensor.data_ptr()
    return start, start + _reach(tensor) * tensor.element_size()


def _reach(tensor: Tensor) -> int:
    """How many elements lie from the first to the last."""
    count = tensor.numel()
    if count == 0 or tensor.is_contiguous():
        return count
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _check_storage(tensor: Tensor, name: str) -> None:
    if (reach := _reach(tensor)) == 0:
        return
    needed = (tensor.storage_offset() + reach) * tensor.element_size()
    if (found := tensor.untyped_storage().nbytes()) < needed:
        raise InvalidShape(
            f"{name} has {found} bytes of memory and reads {needed}: its storage was freed or "
            "made smaller"
        )

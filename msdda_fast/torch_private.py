# SPDX-License-Identifier: Apache-2.0
"""Every private part of torch that this package uses, in one place.

A new torch may change any of these without notice. Each comment says what the thing is, which torch
it is known to work with (this package supports 2.9 and newer), and what to look at when it breaks.
`tests/test_torch_private.py` finds uses elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# _functorch.maybe_current_level: the depth of `torch.func` transforms (vmap, grad, jvp), or None;
# since 2.1. Tensors in them have no addresses. If it goes, `tensor.data_ptr()` raises there.
from torch._C import _functorch

# FakeTensor: a tensor with a shape, dtype and device but no data. Behind `torch.compile` and
# `torch.export` since 2.0, documented but never moved out of `torch._subclasses`. `import torch`
# loads the module itself. Watch `FakeTensorMode.from_tensor` and the behaviour of `copy_` between
# devices; tests/engine/test_step.py fails first.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# forward_ad._current_level: the depth of `forward_ad.dual_level()`, -1 outside; since 1.11. Without
# it, ask `forward_ad.unpack_dual` of each tensor every time.
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

# TorchDispatchMode: sees every operator that is called inside it; since 1.13. The public notes on
# extending torch describe it, yet its module is private. Watch how `__torch_dispatch__` is called.
# _get_current_dispatch_mode: the innermost of them, or None; since 2.0. If it goes, the same is in
# `_get_current_dispatch_mode_stack()`.
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

# tree_map and its kin: nested lists, tuples and dicts as flat lists; since 1.8 to 2.1. There is no
# public twin in 2.13; `optree` would be one more dependency.
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "abandon_pool",
    "calls_forward",
    "compiled_call",
    "conv_forward",
    "has_tangent",
    "held_by",
    "hooks_of",
    "in_dispatch_mode",
    "in_function_transform",
    "inductor_options",
    "is_batched",
    "is_compiled",
    "keep_busy",
    "make_wrapper",
    "recompile_limit",
    "replace_parameters",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "versions_of",
    "without_torch_function",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def abandon_pool(device: int, pool: Any) -> None:  # noqa: ANN401 - torch's handle of a memory pool
    """Take back what a capture that failed has left in the allocator.

    A capture whose end fails never tells the allocator that it is over: the pool stays registered,
    so that `empty_cache` raises and no block is used again. _cuda_endAllocateToPool and
    _cuda_releasePool are what `torch.cuda.use_mem_pool` calls, since 2.7; 2.11 and 2.13 were read.

    Args:
        device: Index of the GPU.
        pool: Handle of the pool that the capture allocated from.
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the capture did end, and its graph releases the pool
    torch._C._cuda_releasePool(device, pool)


def in_dispatch_mode() -> bool:
    """Whether a `TorchDispatchMode` sees the operators that are called now."""
    return _get_current_dispatch_mode() is not None


def keep_busy(cycles: int) -> None:
    """Queue a kernel that spins for so many clock cycles of the current GPU on its stream.

    torch.cuda._sleep: since 0.4, used throughout torch's own tests of streams. Without it, time a
    graph of the calls instead.
    """
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def make_wrapper(kind: type[Tensor], like: Tensor) -> Any:  # noqa: ANN401 - an instance of `kind`
    """A tensor of a subclass that looks like `like` and holds no data of its own."""
    # Tensor._make_wrapper_subclass: since 1.10, used by torch's own subclasses (DTensor) and in
    # its notes on extending torch. Watch its keywords.
    return Tensor._make_wrapper_subclass(
        kind,
        like.shape,
        strides=like.stride(),
        dtype=like.dtype,
        device=like.device,
        requires_grad=False,
    )


def without_torch_function() -> AbstractContextManager[None]:
    """A context in which tensor subclasses do not see the functions that are called."""
    # _C.DisableTorchFunctionSubclass: since 2.0; what Tensor's own `__torch_function__` uses.
    guard: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return guard


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` is under way: vmap, grad, jvp."""
    return _functorch.maybe_current_level() is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether this tensor is one of many in `torch.func.vmap`, without values of its own."""
    # _functorch.is_functorch_wrapped_tensor, .is_batchedtensor, .get_unwrapped: what a transform
    # puts around a tensor, one level after the other; since 2.0.
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether forward-mode differentiation follows one of these tensors."""
    if forward_ad._current_level < 0:
        return False
    unpack = forward_ad.unpack_dual  # has no types
    return any(unpack(tensor).tangent is not None for tensor in tensors)  # type: ignore[no-untyped-call]


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place; 0 for inference tensors, which do not count."""
    # Tensor._version: autograd's counter, since 0.4; `torch.autograd.graph` has no public reading
    # of it. Reading it from an inference tensor raises.
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def conv_forward(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """`conv(x)` with another weight and no bias, with its stride, padding mode and dilation."""
    # Conv2d._conv_forward: the (input, weight, bias) behind `forward`, since 1.5. Without it, call
    # `functional.conv2d` and handle `padding_mode` by hand.
    y: Tensor = conv._conv_forward(x, weight, None)
    return y


def held_by(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The dictionaries in which a module keeps its children, parameters and buffers."""
    # Module._modules, ._parameters, ._buffers: since 0.1. The public iterators build all names each
    # time: milliseconds for a UNet, where looking an entry up takes nanoseconds.
    return module._modules, module._parameters, module._buffers


def hooks_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The dictionaries of hooks before and after a module's forward: its own, those of all modules.

    Other hooks only watch it.
    """
    # Module._forward_pre_hooks, ._forward_hooks: since 0.1; hooks that take keywords are in both
    # these and a dictionary of their own. _global_forward_pre_hooks, _global_forward_hooks of its
    # module: what `register_module_forward_hook` fills; since 1.8.
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_forward_hooks,
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` replaced what calling it runs."""
    # Module._compiled_call_impl: since 2.1; `torch.compile(module)` makes another module instead.
    return module._compiled_call_impl is not None


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What `module.compile()` made of calling it, hooks included; None: it was not compiled."""
    compiled: Callable[..., Any] | None = module._compiled_call_impl  # as above
    return compiled


@contextmanager
def calls_forward(module: nn.Module) -> Iterator[None]:
    """A context in which calling a module calls its forward, whether or not it was compiled."""
    # Module._compiled_call_impl: as above.
    compiled = module._compiled_call_impl
    if compiled is None:
        yield
        return
    module._compiled_call_impl = None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def replace_parameters(module: nn.Module, **parameters: nn.Parameter | None) -> None:
    """Give `module` other parameters, and leave alone the module it is a shallow copy of."""
    # Module._parameters: the dict of a module's own parameters, since 0.1. A shallow copy shares
    # the dict with its original, and assigning an attribute would write into both.
    module._parameters = {**module._parameters, **parameters}


def inductor_options(mode: str) -> dict[str, Any]:
    """The options of inductor that a mode of `torch.compile` stands for.

    Args:
        mode: A mode of `torch.compile`, such as "max-autotune-no-cudagraphs".
    """
    # _inductor.list_mode_options: since 2.0 and also `torch._inductor.list_mode_options`; needed
    # because `torch.compile` takes a mode or options, not both. Imported here: it takes seconds.
    from torch import _inductor

    options: dict[str, Any] = _inductor.list_mode_options(mode)
    return options


def recompile_limit(function: Function, limit: int) -> Function:
    """Return compiled `function` with another limit on how often its code may be compiled."""
    # _dynamo.config: `recompile_limit` and `accumulated_recompile_limit` have these names since
    # 2.7 (before: cache_size_limit); `torch.compiler.config` has no counterpart in 2.13.
    from torch import _dynamo

    patch = _dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=limit)
    patched: Function = patch(function)
    return patched

# SPDX-License-Identifier: Apache-2.0
"""Layers prepared for M adapters: buffers at fixed addresses, and `forward`."""

from abc import abstractmethod
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from msdda_fast.errors import BackendUnavailable, InvalidShape
from msdda_fast.kernels import registry
from msdda_fast.kernels.grouped_lora import _eager
from msdda_fast.kernels.grouped_lora._merge import MERGE_LIMIT, check_merge

__all__ = ["FactoredLinear", "FoldedConv2d", "FoldedLinear", "GroupedSite", "MergedLinear"]


class GroupedSite(nn.Module):
    """Base of all designs: holds the base layer's tensors without copying, and checks inputs.

    Args:
        base: The layer; its weight is (N, C, *k).
        down: A_m, (M, R, C, *k), any float dtype.
        up: B_m with the scale folded in, (M, N, R, *1), any float dtype.

    Attributes:
        num_objectives: M.

    Raises:
        InvalidShape: Factors do not fit the weight or each other.
    """

    weight: Tensor
    bias: Tensor | None
    #: Whether `forward` may run on an input that requires grad.
    differentiates = False

    def __init__(self, base: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor) -> None:
        super().__init__()
        weight = base.weight.detach()
        if down.ndim != weight.ndim + 1 or down.shape[2:] != weight.shape[1:]:
            raise InvalidShape(
                f"down has shape {tuple(down.shape)}, expected (M, R, "
                f"{', '.join(map(str, weight.shape[1:]))}) for a weight {tuple(weight.shape)}"
            )
        expected = (len(down), len(weight), down.shape[1], *(1,) * (weight.ndim - 2))
        if tuple(up.shape) != expected:
            raise InvalidShape(f"up has shape {tuple(up.shape)}, expected {expected}")
        if not prod(down.shape[:2]):
            raise InvalidShape(f"down has shape {tuple(down.shape)}, expected M >= 1 and R >= 1")
        self.num_objectives = len(down)
        self.register_buffer("weight", weight, persistent=False)
        bias = None if base.bias is None else base.bias.detach()
        self.register_buffer("bias", bias, persistent=False)

    def _keep(self, name: str, tensor: Tensor) -> None:
        """Register a dense tensor of our own, in the weight's dtype and on its device."""
        self.register_buffer(name, tensor.to(self.weight).contiguous(), persistent=False)

    def _check(self, x: Tensor, channel_axis: int, ndim: tuple[int, int]) -> None:
        """Raise unless `x` has the layer's channels, dtype and device, and whole groups."""
        channels = self.weight.shape[1]
        if not ndim[0] <= x.ndim <= ndim[1] or x.shape[channel_axis] != channels:
            raise InvalidShape(
                f"x has shape {tuple(x.shape)}, expected {channels} channels on axis {channel_axis}"
                f" for a weight {tuple(self.weight.shape)}"
            )
        if len(x) % self.num_objectives:
            raise InvalidShape(
                f"x has shape {tuple(x.shape)}, expected a first axis that is a multiple of "
                f"{self.num_objectives} objectives"
            )
        if x.dtype != self.weight.dtype or x.device != self.weight.device:
            raise InvalidShape(
                f"x is {x.dtype} on {x.device}, expected {self.weight.dtype} on "
                f"{self.weight.device}"
            )
        if not self.differentiates and x.requires_grad and torch.is_grad_enabled():
            raise BackendUnavailable(
                f"{type(self).__name__} is for inference only and x requires grad; use "
                'design="separate", which differentiates, or torch.no_grad()'
            )


class _GroupedLinear(GroupedSite):
    """x (M * anything, ..., C) -> (M * anything, ..., N), objective-major."""

    def forward(self, x: Tensor) -> Tensor:
        """y[m] = x[m] W^T + b + (x[m] A_m^T) B_m^T.

        Args:
            x: (D, ..., C) with D a multiple of M, objective-major, in the dtype of the weight.

        Returns:
            (D, ..., N).

        Raises:
            InvalidShape: Another shape, dtype or device.
            BackendUnavailable: `x` requires grad and the design does not differentiate.
        """
        self._check(x, -1, (2, x.ndim))
        lead = x.shape[:-1]
        rows = prod(lead) // self.num_objectives
        y = self._grouped(x.reshape(self.num_objectives, rows, x.shape[-1]))
        return y.view(*lead, y.shape[-1])

    @abstractmethod
    def _grouped(self, x: Tensor) -> Tensor:
        """(M, rows, C) -> (M, rows, N)."""


class FactoredLinear(_GroupedLinear):
    """Designs D and F: separate factors, M R (C + N) numbers in addition to the shared weight.

    In half precision D rounds R up to a multiple of 8, with zeros.

    Args:
        base: The layer that all objectives share.
        down, up: Factors A (M, R, C) and B (M, N, R) of the objectives.
        backend: "eager" (D, differentiates) or "triton" (F).

    Raises:
        BackendUnavailable: The backend cannot run here.
        InvalidShape: A float64 weight for "triton".
    """

    down: Tensor  # (M, R, C)
    up: Tensor  # (M, N, R)

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, *, backend: str) -> None:
        super().__init__(base, down, up)
        if backend == "triton" and self.weight.dtype == torch.float64:
            raise InvalidShape("a weight of torch.float64; Triton sums in float32")
        self.differentiates = backend == "eager"
        module = registry.resolve("grouped_lora", backend, self.weight.device.type)
        self._run = module.run
        # rows of x A^T of fewer than 16 bytes would keep cuBLAS from its fast kernels
        spare = -down.shape[1] % 8 if backend == "eager" and self.weight.itemsize == 2 else 0
        self._keep("down", functional.pad(down.detach(), (0, 0, 0, spare)))
        self._keep("up", functional.pad(up.detach(), (0, spare)))

    def _grouped(self, x: Tensor) -> Tensor:
        return self._run(x, self.weight, self.bias, self.down, self.up)


class _Folded(GroupedSite):
    """Design E: the A_m as extra output channels of one folded copy of the base."""

    folded: Tensor  # (P, C, *k)
    folded_bias: Tensor | None  # (P,)
    up: Tensor  # (M, N, R)

    def __init__(self, base: nn.Linear | nn.Conv2d, down: Tensor, up: Tensor) -> None:
        super().__init__(base, down, up)
        folded, bias = _eager.fold(self.weight, self.bias, down.detach())
        self.register_buffer("folded", folded, persistent=False)
        self.register_buffer("folded_bias", bias, persistent=False)
        self._keep("up", up.detach().flatten(2))


class FoldedLinear(_Folded, _GroupedLinear):
    """Design E: one GEMM with M R more columns, and one small batched one."""

    def _grouped(self, x: Tensor) -> Tensor:
        return _eager.run_folded(x, self.folded, self.folded_bias, self.up)


class FoldedConv2d(_Folded):
    """Design E of a convolution: one with M R more channels, then a batched 1x1.

    Args:
        base: A convolution without groups, zero-padded.
        down, up: Factors as in `GroupedSite`.

    Raises:
        InvalidShape: Factors do not fit, or the convolution has groups or another padding mode.
    """

    def __init__(self, base: nn.Conv2d, down: Tensor, up: Tensor) -> None:
        if base.groups != 1 or base.padding_mode != "zeros":
            raise InvalidShape(
                f"a convolution with {base.groups} groups and padding mode {base.padding_mode!r}; "
                "expected 1 group and 'zeros'"
            )
        super().__init__(base, down, up)
        self.stride, self.padding, self.dilation = base.stride, base.padding, base.dilation
        if self.weight.is_contiguous(memory_format=torch.channels_last):
            # as the base has it; concatenation may have changed it
            self.folded = self.folded.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """y[m] = conv(x[m], W) + b + B_m conv(x[m], A_m).

        Args:
            x: (D, C, H, W) with D a multiple of M, objective-major, in the dtype of the weight.

        Returns:
            (D, N, H', W') in the memory format that the base convolution gives.

        Raises:
            InvalidShape: Another shape, dtype or device.
            BackendUnavailable: `x` requires grad.
        """
        self._check(x, 1, (4, 4))
        return _eager.run_folded_conv(
            x, self.folded, self.folded_bias, self.up, self.stride, self.padding, self.dilation
        )


class MergedLinear(_GroupedLinear):
    """Design G: one weight per objective, one batched GEMM; refused if rounding loses too much.

    Args:
        base, down, up: As in `GroupedSite`; float32 factors are merged before they are rounded.
        limit: Largest accepted `merge_error`, no unit.
        name: Name of the site in errors.

    Raises:
        UnfaithfulMerge: An objective exceeds `limit`.
    """

    merged: Tensor  # (M, N, C)
    differentiates = True

    def __init__(
        self,
        base: nn.Linear,
        down: Tensor,
        up: Tensor,
        *,
        limit: float = MERGE_LIMIT,
        name: str = "site",
    ) -> None:
        super().__init__(base, down, up)
        self._keep("merged", check_merge(self.weight, down.detach(), up.detach(), limit, name))

    def _grouped(self, x: Tensor) -> Tensor:
        return _eager.run_merged(x, self.merged, self.bias)

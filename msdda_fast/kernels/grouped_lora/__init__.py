# SPDX-License-Identifier: Apache-2.0
r"""One linear or convolution layer with M adapters, each on its own equal share of the rows.

    y[m] = x[m] W^T + b + (x[m] A_m^T) B_m^T,   m = 0 .. M - 1,

with x (M, rows, C), W (N, C), b (N,), A_m (R, C), B_m (N, R) and y (M, rows, N). The scale s_m of
an adapter is folded into B_m. Network rows are ordered (M, K, B), so group m is a contiguous block
of rows, and its adapter applies to all of them: no index, no gather. Adapters of lower rank have
zeros beyond it; an adapter that leaves the layer alone has zeros everywhere.

`grouped_site` prepares a layer in one of four designs of the same result:

    "separate"  the reference: three GEMMs, in the base's own weight. Differentiates.
    "folded"    the default: A_1 .. A_M are extra columns of a copy of W, then one batched GEMM on
                each group's own columns. Linear layers return a view with rows a bit more than N
                apart, convolutions a dense tensor.
    "fused"     one Triton launch, in the base's own weight.
    "merged"    one batched GEMM over W + B_m A_m, where `merge_error` stays below a limit.

A site holds its tensors at fixed addresses. The base's weight and bias are shared, except by
"folded" and "merged", which hold rounded copies of the weight: rebuild them after the base changes.
Build a site once the base is on its device and in its dtype.

`kernels.raw` declares the raw function of each backend.
"""

from typing import Literal

from torch import Tensor, nn

from msdda_fast.errors import InvalidShape
from msdda_fast.kernels.grouped_lora._eager import add_updates
from msdda_fast.kernels.grouped_lora._merge import MERGE_LIMIT, merge_error
from msdda_fast.kernels.grouped_lora._sites import (
    FactoredLinear,
    FoldedConv2d,
    FoldedLinear,
    MergedLinear,
)

__all__ = [
    "DEFAULT_DESIGN",
    "MERGE_LIMIT",
    "Design",
    "FactoredLinear",
    "FoldedConv2d",
    "FoldedLinear",
    "MergedLinear",
    "Site",
    "add_updates",
    "grouped_site",
    "merge_error",
]

Design = Literal["separate", "folded", "fused", "merged"]
#: Copies no weight, and takes adapters of any size in any precision.
DEFAULT_DESIGN: Design = "separate"
Site = FactoredLinear | FoldedConv2d | FoldedLinear | MergedLinear


def grouped_site(
    base: nn.Linear | nn.Conv2d,
    down: Tensor,
    up: Tensor,
    *,
    design: Design = DEFAULT_DESIGN,
    limit: float = MERGE_LIMIT,
    name: str = "site",
) -> Site | nn.Linear | nn.Conv2d:
    """Prepare a layer for M adapters.

    Args:
        base: nn.Linear, or nn.Conv2d (any kernel, stride, padding and dilation; one group).
        down: A_m, (M, R, C, *k), any float dtype; kept in the dtype of the weight.
        up: B_m with the scale folded in, (M, N, R, *1), likewise.
        design: Of a linear layer: "separate", "folded", "fused" or "merged". Convolutions are
            always folded.
        limit: For "merged": the largest accepted `merge_error`, no unit.
        name: Name of the layer in errors, such as its path.

    Returns:
        A module to use in place of `base`. With R = 0 no adapter touches the layer, and this is
        `base` itself.

    Raises:
        InvalidShape: Factors do not fit; the message gives both shapes.
        UnfaithfulMerge: "merged" would lose more than `limit` of an adapter to rounding.
        BackendUnavailable: "fused", but Triton cannot run on the device.
        ValueError: The design is unknown.
    """
    if down.ndim < 2:
        raise InvalidShape(f"down has shape {tuple(down.shape)}, expected (M, R, C, *k)")
    if down.shape[1] == 0:
        return base
    if isinstance(base, nn.Conv2d):
        return FoldedConv2d(base, down, up)
    if design == "folded":
        return FoldedLinear(base, down, up)
    if design == "merged":
        return MergedLinear(base, down, up, limit=limit, name=name)
    if design not in ("separate", "fused"):
        raise ValueError(
            f'design must be "separate", "folded", "fused" or "merged", got {design!r}'
        )
    backend = "eager" if design == "separate" else "triton"
    return FactoredLinear(base, down, up, backend=backend)

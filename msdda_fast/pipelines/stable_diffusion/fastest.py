# SPDX-License-Identifier: Apache-2.0
"""The faster way to evaluate a batched forward on this CPU, by measurement."""

from __future__ import annotations

import logging
import statistics
import time

import torch
from torch import Tensor

from msdda_fast.batched.exported import ExportedForward, check_exportable
from msdda_fast.batched.unet import BatchedUNet
from msdda_fast.errors import BackendUnavailable, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.exact import Forward

__all__ = ["fastest"]

logger = logging.getLogger(__name__)

#: An exported forward holds its weights again, for each shape and each set of objectives; networks
#: with more bytes than this are exported only when OpenVINO is asked for by name.
MOST_BYTES = 2**28

#: Times that each way is run; the first ones warm it up.
WARM_UP, ROUNDS = 2, 10


def fastest(unet: BatchedUNet, x: Tensor) -> Forward:
    """Return `unet` itself or its export to OpenVINO, whichever has the lower median time.

    Where OpenVINO is not installed or does not suit the network, it is `unet`. If it ought to run
    and does not, a warning says why.

    Args:
        unet: Its `begin` has been called.
        x: Latents (B, C, h, w); only the shape counts.
    """
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    try:
        check_exportable(unet)
    except (BackendUnavailable, UnsupportedNetwork):
        return unet
    if weights > MOST_BYTES:
        return unet
    try:
        exported = ExportedForward(unet, x.shape)
    except UnsupportedNetwork as error:
        logger.warning("%s; it runs eagerly instead", error)
        return unet
    eager_s, exported_s = median_times([unet, exported], x)
    logger.info("a forward takes %.2g s eagerly, %.2g s through OpenVINO", eager_s, exported_s)
    return exported if exported_s < eager_s else unet


def median_times(forwards: list[Forward], x: Tensor) -> list[float]:
    """Return the median seconds of each forward at step 0; they take turns."""
    k = torch.zeros((), dtype=torch.int64, device=x.device)
    times: list[list[float]] = [[] for _ in forwards]
    for _ in range(WARM_UP + ROUNDS):
        for seen, forward in zip(times, forwards, strict=True):
            start = time.perf_counter()
            forward(x, k)
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen[WARM_UP:]) for seen in times]

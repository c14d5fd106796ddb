# SPDX-License-Identifier: Apache-2.0
"""Balance several aligned diffusion models at inference time: the exact fused reverse step.

`fast_fuse_step` serves other samplers, `coefficient_table` and `fused_ddim_step` take raw network
outputs, `denoise` any denoisers over one latent space, `fused_scheduler` the loop of others;
`MSDDAPipeline` is for diffusers users, and `Engine` draws the requests of many callers in shared
batches.
"""

from typing import TYPE_CHECKING, Any

from msdda_fast.engine.loop import denoise
from msdda_fast.errors import (
    AdapterMismatch,
    AssetsMissing,
    BackendUnavailable,
    CaptureError,
    EngineClosed,
    EngineFailed,
    InvalidAdapter,
    InvalidMode,
    InvalidOutput,
    InvalidRequest,
    InvalidSchedule,
    InvalidShape,
    InvalidWeights,
    MSDDAError,
    NotFinite,
    PipelineBusy,
    QueueFull,
    RankLost,
    RanksDiffer,
    RequestTimeout,
    ResumeMismatch,
    RewardUnavailable,
    UnfaithfulMerge,
    UnknownObjective,
    UnsupportedNetwork,
    WriteFailed,
    ZeroVariance,
)
from msdda_fast.kernels.counter_noise import counter_noise
from msdda_fast.kernels.fused_step import FusedStep, fast_fuse_step, fused_ddim_step
from msdda_fast.levels import CPS, DanceSDE, FlowDDIM, FlowSDE
from msdda_fast.objective import Objective
from msdda_fast.steps.shares import effective_weights
from msdda_fast.steps.table import coefficient_table

if TYPE_CHECKING:
    from msdda_fast.batching import Engine, ImageRequest
    from msdda_fast.pipelines import MSDDAPipeline
    from msdda_fast.pipelines.fused_scheduler import fused_scheduler

__version__ = "0.1.0"

__all__ = [
    "CPS",
    "AdapterMismatch",
    "AssetsMissing",
    "BackendUnavailable",
    "CaptureError",
    "DanceSDE",
    "Engine",
    "EngineClosed",
    "EngineFailed",
    "FlowDDIM",
    "FlowSDE",
    "FusedStep",
    "ImageRequest",
    "InvalidAdapter",
    "InvalidMode",
    "InvalidOutput",
    "InvalidRequest",
    "InvalidSchedule",
    "InvalidShape",
    "InvalidWeights",
    "MSDDAError",
    "MSDDAPipeline",
    "NotFinite",
    "Objective",
    "PipelineBusy",
    "QueueFull",
    "RankLost",
    "RanksDiffer",
    "RequestTimeout",
    "ResumeMismatch",
    "RewardUnavailable",
    "UnfaithfulMerge",
    "UnknownObjective",
    "UnsupportedNetwork",
    "WriteFailed",
    "ZeroVariance",
    "coefficient_table",
    "counter_noise",
    "denoise",
    "effective_weights",
    "fast_fuse_step",
    "fused_ddim_step",
    "fused_scheduler",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    # diffusers and transformers take seconds to import, and samplers never need them
    if name == "MSDDAPipeline":
        from msdda_fast.pipelines import MSDDAPipeline

        return MSDDAPipeline
    if name == "fused_scheduler":
        from msdda_fast.pipelines.fused_scheduler import fused_scheduler

        return fused_scheduler
    if name in ("Engine", "ImageRequest"):
        from msdda_fast import batching

        return getattr(batching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

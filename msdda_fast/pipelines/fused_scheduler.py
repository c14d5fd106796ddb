# SPDX-License-Identifier: Apache-2.0
"""A scheduler of diffusers whose `step` fuses the predictions of several objectives.

It is the scheduler itself in a dynamic subclass of its own class, so that `isinstance`, signatures
and its config are those that loops expect. Its step takes one of two ways:

- *Stock.* Where all noise levels are equal, Algorithm 1 is the stock scheduler on sum_i w_i out_i,
  history and two-stage solvers included: the mean of Eq. 7 is linear in the predictions.
- *Table.* Where they differ, where the objectives bring noise of flow models, and where seeds ask
  for counter noise, the coefficients of a rule and the fused kernel decide. The stock step then
  runs on the mixed prediction for what else it does and returns: checks, its step index, x_0.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.kernels.randomness import check_one_source
from msdda_fast.pipelines.fusing import Fusing, FusingOptions
from msdda_fast.pipelines.loop_noise import LoopNoise
from msdda_fast.pipelines.stock_schedulers import check_scheduler

if TYPE_CHECKING:
    from msdda_fast.levels import NoiseLevels
    from msdda_fast.types import (
        Backend,
        Fusion,
        GeneratorLike,
        SeedsLike,
        WeightSchedule,
        ZeroVariancePolicy,
    )

__all__ = ["fused_scheduler", "with_fusing"]


def fused_scheduler(
    scheduler: Any,  # noqa: ANN401 - any scheduler of diffusers
    *,
    count: int | None = None,
    levels: NoiseLevels | None = None,
    weights: WeightSchedule = None,
    seeds: SeedsLike | None = None,
    generator: GeneratorLike | None = None,
    fusion: Fusion | None = None,
    zero_variance: ZeroVariancePolicy = "error",
    rates: Sequence[float] | Tensor | None = None,
    extrapolate: bool = False,
    state_dtype: torch.dtype | None = torch.float32,
    backend: Backend = "auto",
) -> Any:  # noqa: ANN401 - of the scheduler's class
    """Return a scheduler whose `step` takes the predictions of M objectives.

        scheduler = mf.fused_scheduler(pipe.scheduler, levels=[mf.FlowSDE(0.7), mf.FlowSDE(0.4)],
                                       weights=[0.3, 0.7], seeds=[0])
        scheduler.set_timesteps(28)
        for t in scheduler.timesteps:
            outputs = torch.stack([network(x, t) for network in networks])    # (M, B, *S)
            x = scheduler.step(outputs, t, x).prev_sample

    It is a shallow copy in a subclass of the scheduler's class; the scheduler itself is not
    changed. `step(model_output, timestep, sample, ...)` keeps its signature and what it returns.
    `model_output` is (M, B, *S), or a sequence of M tensors (B, *S), guided if guidance is wanted;
    with M = 1 also (B, *S). Guidance must be done before. The attribute `fusing` holds the settings
    (`Fusing`), of which `weights` and `noise.seeds` may be assigned between two runs.

    Args:
        scheduler: A scheduler of diffusers that is linear in its prediction; see
            `pipelines.stock_schedulers`. Timesteps may be set before or after.
        count: M; None: as many as there are levels, or as the weights say.
        levels: (M,) noise levels: numbers of the scheduler's own kind, or noise of flow models
            (`FlowSDE(0.7)`); see `coefficient_table`. None: the step that the scheduler takes by
            itself, at the `eta` that the loop gives it.
        weights: Preferences (M,) or (B, M), rows on the simplex, or a callable from the position k
            of the timestep in `timesteps` to either, or a mapping from ranges of timesteps, both
            ends included, to either; None is uniform. Or (B, M, *S), a preference of every pixel,
            sum 1 over M, each axis of S that of the sample or 1, and two of them or more.
        seeds: One 64-bit seed per sample, for noise that depends on nothing else: counter noise
            where the scheduler has a rule, else generators seeded by it. A deep copy of the
            scheduler (for a second modality, say) has noise of its own.
        generator: Instead: one generator, or one per sample. With neither: the generator that the
            loop gives `step`, if any, or torch's default one. Deep copies share it.
        fusion, zero_variance, rates, extrapolate: As in `coefficient_table`.
        state_dtype: Dtype of the states that `step` returns; None: as the stock step does.
        backend: Of the kernels: "auto", or one by name.

    Raises:
        InvalidSchedule: A scheduler that is not known to be linear, or is set to clip, to threshold
            or to learn variances; levels of another kind than its own; a level outside its range.
        InvalidShape: `levels` or `weights` of another shape.
        InvalidWeights: Weights off the simplex.
        ValueError: Both `seeds` and `generator`.
    """
    check_one_source(seeds=seeds, generator=generator)
    check_scheduler(scheduler, steered=seeds is not None or generator is not None)
    fusing = Fusing(
        scheduler,
        FusingOptions(
            fusion=fusion,
            zero_variance=zero_variance,
            rates=rates,
            extrapolate=extrapolate,
            state_dtype=state_dtype,
            backend=backend,
        ),
        count=count,
        levels=levels,
        weights=weights,
        noise=LoopNoise(seeds, generator),
    )
    return with_fusing(scheduler, fusing)


def with_fusing(scheduler: Any, fusing: Fusing) -> Any:  # noqa: ANN401 - of the scheduler's class
    """Return a shallow copy of a scheduler whose step is that of `fusing`."""
    fused = copy.copy(scheduler)
    stock: Any = getattr(scheduler, "stock_class", type(scheduler))
    fused.__class__ = _fused_class(stock)
    fused.fusing = fusing
    return fused


@functools.cache
def _fused_class(stock: Any) -> type:  # noqa: ANN401 - any scheduler's class
    """Return a subclass of `stock` whose instances fuse; they have an attribute `fusing`."""
    stock_step: Callable[..., Any] = stock.step

    @functools.wraps(stock_step)  # loops ask for the signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as stock
        return self.fusing.step(self, stock_step, args, kwargs)

    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as stock
        stock.set_timesteps(self, *args, **kwargs)
        self.fusing.begin(self)

    def shallow(self: Any) -> Any:  # noqa: ANN401 - a scheduler
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, fusing=copy.copy(self.fusing))
        return made

    return type(
        stock.__name__,  # as it stands in the index of a saved pipeline
        (stock,),
        {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "__copy__": shallow,
            "stock_class": stock,
            "step": step,
            "set_timesteps": set_timesteps,
        },
    )

# SPDX-License-Identifier: Apache-2.0
"""What a fused scheduler knows of its objectives, and the two ways of its step.

See `fused_scheduler` for what the two ways are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msdda_fast.errors import InvalidSchedule
from msdda_fast.kernels.fused_step import fused_ddim_step
from msdda_fast.pipelines.loop_noise import LoopNoise
from msdda_fast.pipelines.predictions import by_objective
from msdda_fast.pipelines.step_weights import StepWeights, count_of
from msdda_fast.pipelines.stock_schedulers import position, steps_once, stock_arguments
from msdda_fast.steps.coefficients import (
    CoefficientTable,
    StepCoefficients,
    mixture,
    pixel_mixture,
)
from msdda_fast.steps.pixel_table import check_pixels
from msdda_fast.steps.pixels import PixelWeights
from msdda_fast.steps.rules import Rule
from msdda_fast.steps.schedulers import (
    check_kind,
    entry_of,
    has_timesteps,
    levels_of,
    scheduler_rule,
)
from msdda_fast.steps.table import rule_table

if TYPE_CHECKING:
    from msdda_fast.levels import NoiseLevels
    from msdda_fast.types import (
        Backend,
        Fusion,
        WeightSchedule,
        ZeroVariancePolicy,
    )

__all__ = ["Fusing", "FusingOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusingOptions:
    """How steps are fused; see `fused_scheduler`."""

    fusion: Fusion | None
    zero_variance: ZeroVariancePolicy
    rates: Sequence[float] | Tensor | None
    extrapolate: bool
    state_dtype: torch.dtype | None
    backend: Backend


class Fusing:
    """The settings and the state of one fused scheduler.

    Args:
        scheduler: The stock one.
        options: How steps are fused.
        count, levels, weights: As in `fused_scheduler`.
        noise: Of the steps.

    Attributes:
        weights: May be assigned before `set_timesteps`.
        noise: Its seeds or generator, too.
        count: M.
    """

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401 - any scheduler of diffusers
        options: FusingOptions,
        *,
        count: int | None,
        levels: NoiseLevels | None,
        weights: WeightSchedule,
        noise: LoopNoise,
    ) -> None:
        self._options = options
        self._levels = None if levels is None else levels_of(scheduler, None, levels, count)
        self.count = count_of(count, self._levels, weights)
        self.weights, self.noise = weights, noise
        self.begin(scheduler)

    @property
    def is_stock(self) -> bool:
        """Whether the stock step runs with nothing changed but the prediction."""
        return self._arguments == {} and self.noise.seeds is None and self.noise.generator is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusing:
        made = copy.copy(self)  # weights may be a method of something large
        made.noise = copy.deepcopy(self.noise, memo)
        return made

    def begin(self, scheduler: Any) -> None:  # noqa: ANN401 - any scheduler of diffusers
        """Take up the timesteps of `scheduler`, if there are any; `set_timesteps` calls this.

        Raises:
            InvalidSchedule, InvalidWeights, InvalidShape, ZeroVariance: As `coefficient_table`.
        """
        self.noise.begin()
        self._now = StepWeights(
            self.weights,
            self.count,
            extrapolate=self._options.extrapolate,
            timesteps=scheduler.timesteps if has_timesteps(scheduler) else None,
        )
        self._levels_now = self._levels
        self._rule: Rule | None = None
        self._table: CoefficientTable | None = None
        self._weights_now: tuple[object, StepCoefficients] | None = None
        self._arguments = stock_arguments(scheduler, self._levels)
        if self.noise.seeds is not None and self._arguments is not None:
            self._ask_for_counter_noise(scheduler)
        if self._levels_now is not None:
            check_kind(scheduler, self._levels_now.noise)
            if has_timesteps(scheduler):
                self._rule = scheduler_rule(scheduler, None, self._levels_now.noise)
                self._rule.levels.check(self._levels_now.values)
                if self._arguments is None and not self._now.change:
                    table = self._build(None)
                    self._table = table if table.pixels is None else None  # for one pixel
        if self._arguments is not None and self._now.change and not steps_once(scheduler):
            raise InvalidSchedule(
                f"{type(scheduler).__name__} remembers earlier predictions, which were mixed by "
                f"earlier weights: weights that change from step to step need a scheduler of first "
                f"order"
            )

    def step(
        self,
        scheduler: Any,  # noqa: ANN401 - any scheduler of diffusers
        stock_step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401 - what the stock step returns
        """Do `stock_step(scheduler, *args, **kwargs)` with M predictions for one.

        Raises:
            InvalidShape: Not M predictions of the shape of the sample.
            InvalidSchedule: The loop asks for another eta than the objectives have.
        """
        given = inspect.signature(stock_step).bind(scheduler, *args, **kwargs)
        values = given.arguments
        sample: Tensor = values["sample"]
        outputs = by_objective(values["model_output"], sample, self.count)
        dtype = next(output.dtype for output in outputs if output is not None)
        if self._options.state_dtype is not None:
            dtype = torch.promote_types(sample.dtype, self._options.state_dtype)
            values["sample"] = sample = sample.to(dtype)
        self._check_eta(values.get("eta"))
        takes = inspect.signature(stock_step).parameters.keys()
        if self._arguments is None:
            k = position(scheduler, values["timestep"])
            table = self._table_for(sample)
            if k < len(table):
                _refuse_other_arguments(given)
                return self._by_table(stock_step, given, table, k, outputs, dtype, takes)
            values["model_output"] = sample  # LTX lists the end, where its step does nothing
            return stock_step(*given.args, **given.kwargs)
        values |= self._arguments
        if "generator" in takes:
            k = 0 if self.noise.seeds is None else position(scheduler, values["timestep"])
            own = self.noise.generators(k, len(sample))
            values |= {} if own is None else {"generator": own}
        row = self._weight_row(scheduler, values["timestep"], sample)
        values["model_output"] = self._fuse(sample, outputs, row, dtype)
        return stock_step(*given.args, **given.kwargs)

    def _by_table(
        self,
        stock_step: Callable[..., Any],
        given: inspect.BoundArguments,
        table: CoefficientTable,
        k: int,
        outputs: list[Tensor | None],
        dtype: torch.dtype,
        takes: Iterable[str],
    ) -> Any:  # noqa: ANN401 - what the stock step returns
        values, sample = given.arguments, given.arguments["sample"]
        noise = {}
        if table.std.any():
            drawn = next(output.dtype for output in outputs if output is not None)
            noise = self.noise.of_step(k, sample, drawn, values.get("generator"))
        made = self._fuse(sample, outputs, table[k], dtype, **noise)
        values["model_output"] = self._fuse(sample, outputs, table.mixture(k), dtype)
        if "generator" in takes:  # what the stock step draws is dropped
            values["generator"] = torch.Generator(sample.device)
        result = stock_step(*given.args, **given.kwargs)
        if isinstance(result, tuple):
            return (made, *result[1:])
        result.prev_sample = made
        return result

    def _fuse(
        self,
        sample: Tensor,
        outputs: list[Tensor | None],
        coefficients: StepCoefficients,
        dtype: torch.dtype,
        **noise: Any,  # noqa: ANN401 - of `fused_ddim_step`
    ) -> Tensor:
        """A fused step, or with the coefficients of a mixture the weighted prediction."""
        out, backend = torch.empty_like(sample, dtype=dtype), self._options.backend
        noise = noise or {"noise": sample}  # a coefficient of 0 masks it, and no generator moves
        return fused_ddim_step(sample, outputs, coefficients, backend=backend, out=out, **noise)

    def _check_eta(self, eta: float | None) -> None:
        own = None if self._levels is None else self._levels.values
        if own is not None and eta not in (None, 0.0) and bool((own != eta).any()):
            raise InvalidSchedule(
                f"the loop gives step eta={eta}, and the objectives have the levels "
                f"{own.tolist()}: leave eta out"
            )

    def _pixels(self, sample: Tensor | None) -> PixelWeights | None:
        """Weights of every pixel of a sample; without one, any that stand for them in checks."""
        return self._now.pixels

    def _build(self, sample: Tensor | None) -> CoefficientTable:
        assert self._rule is not None and self._levels_now is not None
        options = self._options
        return rule_table(
            self._rule,
            levels=self._levels_now.values,
            weights=self._now.table,
            pixels=self._pixels(sample),
            batch_size=None if sample is None else len(sample),
            zero_variance=options.zero_variance,
            rates=options.rates,
            extrapolate=options.extrapolate,
            fusion=options.fusion,
            dtype=torch.float64,
        )

    def _table_for(self, sample: Tensor) -> CoefficientTable:
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        if (table := self._table) is None:
            table = self._build(sample)
        if (table.rows.dtype, table.rows.device) != (dtype, sample.device):
            table = table.to(sample.device, dtype)
        self._table = table
        return table

    def _weight_row(self, scheduler: Any, timestep: Any, sample: Tensor) -> StepCoefficients:  # noqa: ANN401
        """The weights of this step as coefficients."""
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = (sample.shape, sample.device, dtype)
        if self._weights_now is not None and self._weights_now[0] == key:
            return self._weights_now[1]
        changing, pixels = self._now.change, self._pixels(sample)
        values = self._now.at(position(scheduler, timestep) if changing else 0, len(sample))
        if pixels is None:
            row = mixture(values.to(sample.device, dtype))
        else:
            check_pixels(pixels, values[None], len(sample))
            row = pixel_mixture(pixels.at(values).to(sample.device, dtype))
        if not changing:
            self._weights_now = (key, row)
        return row

    def _ask_for_counter_noise(self, scheduler: Any) -> None:  # noqa: ANN401
        """Take the table's way if the scheduler has a rule and the level is one with noise."""
        entry, levels = entry_of(scheduler), self._levels
        if entry is None:
            return
        if entry.level is not None and levels is None:
            levels = levels_of(scheduler, None, None, self.count)
        if levels is not None and bool((levels.values > 0).any()):
            self._levels_now, self._arguments = levels, None


#: Arguments of a stock step that a rule's step has, too, or that change nothing of the state.
_KNOWN = {"self", "model_output", "timestep", "sample", "generator", "eta", "return_dict"}


def _refuse_other_arguments(given: inspect.BoundArguments) -> None:
    """Refuse what changes a stock step and is not known to its rule, if it is given."""
    for name, value in given.arguments.items():
        usual = given.signature.parameters[name].default
        if name not in _KNOWN and value is not usual and (value is None or value != usual):
            raise InvalidSchedule(
                f"the loop gives step {name}=, which this scheduler's rule for noise levels does "
                f"not know; without levels, its stock step does"
            )

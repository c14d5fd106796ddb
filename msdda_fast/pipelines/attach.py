# SPDX-License-Identifier: Apache-2.0
"""Objectives for any stock diffusers pipeline: its own class, with `weights=` in its call.

Nothing is written per family. For the time of a call every network of the pipeline is hooked to run
all objectives (`row_hook`), what the loop does with predictions runs once per objective
(`hidden_axis`), and the scheduler fuses the objectives' steps (`fused_scheduler`). Between calls
the networks and the scheduler are the stock ones.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.errors import AdapterMismatch, UnknownObjective, UnsupportedNetwork
from msdda_fast.objective import Objective
from msdda_fast.pipelines.batch import Batch
from msdda_fast.pipelines.fused_scheduler import fused_scheduler
from msdda_fast.pipelines.manifest import check_names
from msdda_fast.pipelines.row_hook import RowHook
from msdda_fast.types import Fusion, NoiseLevels, Seeds, WeightSchedule, ZeroVariancePolicy

__all__ = ["WithObjectives", "attach", "detached"]

#: Components that predict what a scheduler's step takes.
_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


class WithObjectives:
    """Mixin before the class of a stock pipeline; `attach` makes the class."""

    _objectives: dict[str, Objective]
    _sets: dict[str, AdapterSet]
    _hooks: dict[str, RowHook]

    @property
    def objectives(self) -> dict[str, Objective]:
        """The objectives by name, in the order of the columns of `weights`."""
        return dict(self._objectives)

    def detach(self) -> DiffusionPipeline:
        """Return the stock pipeline, on the same networks and scheduler."""
        return detached(self)

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,  # noqa: ANN401 - the stock pipeline's own
        weights: WeightSchedule = None,
        seed: Seeds | None = None,
        levels: NoiseLevels | Mapping[str, float] | None = None,
        zero_variance: ZeroVariancePolicy = "error",
        rates: list[float] | None = None,
        extrapolate: bool = False,
        fusion: Fusion | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run the stock pipeline with every step fused from the objectives' (Theorem 1, Eq. 7).

        Everything is checked before the first network runs. B = images = prompts x images per
        prompt, M = objectives, in the order of `objectives`.

        Args:
            args, kwargs: As in the stock pipeline.
            weights: Preferences w, no unit, on the simplex: a mapping from every objective's name
                to a number, a list of mappings, one per prompt, (M,) or (B, M) numbers, or a
                callable from the step index 0..T-1 to any of these. None: uniform. An objective
                whose weight is 0 throughout is not evaluated.
            seed: Counter-based noise in the steps, and x_T from one generator per image: image i
                gets the seed `seed + i`; a list has one per image. An image then depends on its own
                seed alone. None: as in the stock pipeline, `generator` or torch's default one.
            levels: Noise levels in place of the objectives' own, by name or in order.
            zero_variance, rates, extrapolate, fusion: See `msdda_fast.coefficient_table`.

        Returns: What the stock pipeline returns.

        Raises:
            AdapterMismatch: An objective's adapter has been deleted, or fused into the weights.
            UnsupportedNetwork: The pipeline reads predictions on the host, a cache is enabled, or
                it never called its scheduler's step.
            InvalidSchedule, InvalidShape, InvalidWeights, UnknownObjective, ZeroVariance: As
                `msdda_fast.coefficient_table`.
            ValueError: Both `seed` and `generator`.
        """
        self._check_adapters()
        stock = super().__call__  # type: ignore[misc]
        batch = Batch.of(stock, args, kwargs, list(self._objectives))
        rows = batch.weights(weights, extrapolate=extrapolate)
        active = [m for m in range(len(self._objectives)) if bool((rows[..., m] != 0).any())]
        names = [name for m, name in enumerate(self._objectives) if m in active]
        seeds, kwargs = batch.seeded(seed, kwargs)
        scheduler = fused_scheduler(
            self.scheduler,
            weights=rows[..., active],
            levels=self._levels(levels, names),
            seeds=seeds,
            zero_variance=zero_variance,
            rates=None if rates is None else [rates[m] for m in active],
            extrapolate=extrapolate,
            fusion=fusion,
        )
        sets = [self._sets[name] for name in names]
        with ExitStack() as stack:
            for name, network in self.components.items():
                if isinstance(network, nn.Module):
                    stack.enter_context(self._hook(name, network).hooked(sets))
            # past `DiffusionPipeline.__setattr__`, which would write the class into the config
            own, self.__dict__["scheduler"] = self.scheduler, scheduler
            stack.callback(self.__dict__.__setitem__, "scheduler", own)
            result = stock(*args, **kwargs)
        if scheduler.fused_steps == 0:
            raise UnsupportedNetwork(
                f"{type(self).__name__} did not call its scheduler's step, so nothing was fused"
            )
        return result

    def _hook(self, name: str, network: nn.Module) -> RowHook:
        hook = self._hooks.get(name)
        if hook is None or hook.network is not network:
            hook = self._hooks[name] = RowHook(name, network)
        return hook

    def _check_adapters(self) -> None:
        loaded = _loaded(self)
        for name, adapters in self._sets.items():
            for adapter, _ in adapters:
                if adapter not in loaded:
                    raise AdapterMismatch(
                        f"objective {name!r}: its adapter {adapter!r} is no longer in the pipeline"
                    )

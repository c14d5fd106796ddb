# SPDX-License-Identifier: Apache-2.0
"""Objectives for any stock diffusers pipeline: its own class, with `weights=` in its call.

Nothing is written per family. For the time of a call every network of the pipeline is hooked to run
all objectives (`row_hook`), what the loop does with predictions runs once per objective
(`hidden_axis`), and the scheduler fuses the objectives' steps (`fused_scheduler`). Between calls
the networks and the scheduler are the stock ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msdda_fast.adapters.variant import AdapterSet
from msdda_fast.errors import UnsupportedNetwork
from msdda_fast.levels import NoiseLevels
from msdda_fast.objective import Objective
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.adapter_sets import adapter_set, check_loaded, check_objective
from msdda_fast.pipelines.attach_files import DENOISERS, loaded_adapters, networks_of
from msdda_fast.pipelines.batch import Batch
from msdda_fast.pipelines.call_arguments import check_arguments
from msdda_fast.pipelines.call_levels import call_levels
from msdda_fast.pipelines.call_preferences import CallPreferences
from msdda_fast.pipelines.exclusive import one_at_a_time
from msdda_fast.pipelines.fused_scheduler import with_fusing
from msdda_fast.pipelines.fusing import FusingOptions
from msdda_fast.pipelines.held_objectives import HeldObjectives
from msdda_fast.pipelines.in_parallel import agreed_call
from msdda_fast.pipelines.latent_grid import requested_size
from msdda_fast.pipelines.loop_noise import LoopNoise
from msdda_fast.pipelines.manifest import NAMELESS, check_names
from msdda_fast.pipelines.pipeline_step import PipelineFusing, WithBase
from msdda_fast.pipelines.preferences import StrengthsLike
from msdda_fast.pipelines.regions import MasksLike, check_masks, check_softness
from msdda_fast.pipelines.row_hook import RowHook
from msdda_fast.pipelines.stock_methods import attached_class
from msdda_fast.pipelines.stock_schedulers import check_scheduler, set_to
from msdda_fast.types import Fusion, WeightSchedule, ZeroVariancePolicy

__all__ = ["WithObjectives", "attach", "attach_as_it_is"]


class WithObjectives(HeldObjectives):
    """Mixin before the class of a stock pipeline; `attach` makes the class."""

    @torch.no_grad()
    @one_at_a_time
    def __call__(
        self,
        *args: Any,  # noqa: ANN401 - the stock pipeline's own
        weights: WeightSchedule = None,
        masks: MasksLike | None = None,
        mask_softness: float | None = None,
        objective_strength: StrengthsLike | None = None,
        kl_weights: Mapping[str, float] | Sequence[float] | None = None,
        seed: int | Sequence[int] | None = None,
        levels: NoiseLevels | Mapping[str, Any] | None = None,
        etas: NoiseLevels | Mapping[str, Any] | None = None,
        zero_variance: ZeroVariancePolicy = "error",
        rates: Sequence[float] | None = None,
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
                callable from the step index 0..T-1 to any of these, or a mapping from ranges of
                timesteps to them, `{(500, 999): {...}, (0, 499): {...}}`, both ends included. None:
                uniform. An objective whose weight is 0 throughout is not evaluated.
            masks, mask_softness: As `MSDDAPipeline`: where an objective acts, in pixels of the
                image, and how far edges are blurred.
            objective_strength, kl_weights: As `strength` and `kl_weights` of `MSDDAPipeline`, here
                with another name because `strength` of image to image is something else.
            seed: Counter-based noise in the steps, and x_T from one generator per image: image i
                gets the seed `seed + i`; a list has one per image. An image then depends on its own
                seed, prompt and weights only: whatever shares the batch, the noise is the same to
                the bit and the image to the last rounding. None: as in the stock pipeline,
                `generator` or torch's default one.
            levels: Noise levels in place of the objectives' own, in order or by name.
            etas: The same, by the name that Stable Diffusion's pipeline has for it.
            zero_variance, rates, extrapolate, fusion: See `msdda_fast.coefficient_table`.

        Returns: What the stock pipeline returns.

        Raises:
            AdapterMismatch: An objective's adapter has been deleted, or fused into the weights.
            CaptureError: Graphs are required (`set_forward`) and impossible.
            PipelineBusy: A callback called the pipeline that calls it. Other threads wait instead.
            RankLost, RanksDiffer: Several processes share the objectives, and one is lost or
                differs.
            UnsupportedNetwork: The pipeline reads predictions on the host, a cache is enabled, or
                it never called its scheduler's step.
            InvalidSchedule, InvalidShape, InvalidWeights, UnknownObjective, ZeroVariance: As
                `msdda_fast.coefficient_table`.
            ValueError: `seed` and `generator`, `levels` and `etas`, or a scale for adapters.
        """
        if levels is not None and etas is not None:
            raise ValueError("give levels or etas, not both: they are the same")
        levels = etas if levels is None else levels
        stock: Any = super().__call__  # type: ignore[misc]
        scheduler: Any = self.scheduler  # type: ignore[attr-defined]
        batch = Batch.of(stock, args, kwargs)
        names = list(self._objectives)
        regions = None
        check_softness(mask_softness, masks)
        if masks is not None:
            regions = check_masks(
                masks,
                names,
                batch.images,
                *requested_size(self, batch.given),
                images_per_prompt=batch.copies,
                softness=mask_softness,
            )
        prefers = CallPreferences.of(batch, weights, names, regions, extrapolate=extrapolate)
        columns = prefers.columns
        active = {names[m]: self._objectives[names[m]] for m in columns}
        seeds, kwargs = batch.seeded(seed, kwargs)
        check_scheduler(scheduler, steered=seeds is not None)
        own_levels = call_levels(scheduler, active, self._objectives, levels)
        check_arguments(batch.given, own_levels)
        options = FusingOptions(
            fusion=fusion,
            zero_variance=zero_variance,
            rates=None if rates is None else [rates[m] for m in columns],
            extrapolate=extrapolate,
            state_dtype=torch.float32,
            backend="auto",
        )
        fusing = PipelineFusing(
            set_to(scheduler, batch.num_steps),
            options,
            count=len(active),
            levels=own_levels,
            weights=prefers.schedule,
            noise=LoopNoise(seeds, None),
            pixels=prefers.pixels(self),
        )
        own = prefers.strength(objective_strength, kl_weights, batch.copies)
        ranges = [objective.timesteps for objective in active.values()]
        loaded = loaded_adapters(self)
        for name in active:
            check_loaded(name, self._sets[name], loaded)
        sets = [self._sets[name] for name in active]
        if own is not None or any(ranges):
            fusing.with_base = WithBase.of(own, columns, ranges)
            sets.append(self._base_set)
        parallel = self._parallel
        with ExitStack() as stack:
            if parallel is not None:
                settings = {
                    "objectives": [(name, str(self._sets[name])) for name in names],
                    "weights, strength or masks": (weights, masks, mask_softness, own, kl_weights),
                    "levels or options of the step": (str(own_levels), str(options)),
                    "seeds": seeds,
                }
                given, device = batch.given, self._execution_device  # type: ignore[attr-defined]
                stack.enter_context(agreed_call(parallel, settings, given, device))
            for name, network in networks_of(self).items():
                stack.enter_context(self._hook(name, network).hooked(sets, parallel))
            # past `DiffusionPipeline.__setattr__`, which would note the change in the config
            self.__dict__["scheduler"] = with_fusing(scheduler, fusing)
            stack.callback(self.__dict__.__setitem__, "scheduler", scheduler)
            result = stock(*args, **kwargs)
            if parallel is not None and fusing.last is not None:
                parallel.finish(fusing.last)
        if fusing.steps == 0:
            raise UnsupportedNetwork(
                f"{type(self).__name__} did not call its scheduler's step, so nothing was fused"
            )
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the stock class; hooks are of these very networks."""
        stock: type = self.stock_class
        return _of_class, (stock,), {**self.__dict__, "_hooks": {}}

    def _hook(self, name: str, network: nn.Module) -> RowHook:
        hook = self._hooks.get(name)
        if hook is None or hook.network is not network:  # users assign others to a pipeline
            capture = self._capture if name in DENOISERS else "off"  # others run once a call
            hook = self._hooks[name] = RowHook(name, network, capture)
        return hook


def _of_class(stock: type) -> Any:  # noqa: ANN401 - of the class with objectives
    """Return an empty pipeline, to be filled."""
    return object.__new__(attached_class(WithObjectives, stock))


def attach(
    pipeline: DiffusionPipeline,
    objectives: Mapping[str, Objective] | None = None,
    sets: Mapping[str, AdapterSet] | None = None,
    accelerator: Accelerator | None = None,
) -> WithObjectives:
    """Return a pipeline of the same class with objectives, on the same networks and scheduler.

    Args:
        pipeline: Any loaded pipeline of diffusers; it is not changed, and stays usable.
        objectives: By name, in order; a source is the name of a loaded adapter. None: those that
            the pipeline has, else every loaded adapter, else the base model.
        sets: The adapters of each objective, whose sources then are files, and by `NAMELESS` those
            of the base.
        accelerator: What all of `sets` include; None: nothing.

    Raises:
        UnknownObjective: A source is not a loaded adapter.
        UnsupportedNetwork: The pipeline has no denoiser that is known, or no scheduler.
        ValueError: Invalid objectives, or ones with networks or guidance of their own.
    """
    parts = pipeline.components
    if not any(isinstance(parts.get(name), nn.Module) for name in DENOISERS):
        raise UnsupportedNetwork(
            f"{type(pipeline).__name__} has no denoiser that is known ({', '.join(DENOISERS)}); "
            f"its components are {', '.join(parts)}"
        )
    if not hasattr(parts.get("scheduler"), "step"):
        raise UnsupportedNetwork(f"{type(pipeline).__name__} has no scheduler with a step to fuse")
    loaded = loaded_adapters(pipeline)
    if objectives is None and isinstance(pipeline, WithObjectives):
        objectives, accelerator = pipeline.objectives, pipeline.accelerator
        sets = {**pipeline.adapter_sets, NAMELESS: pipeline.base_set}
    if objectives is None:
        objectives = {name: Objective(name) for name in loaded} or {"base": Objective.base()}
    check_names(objectives)
    for name, objective in objectives.items():
        check_objective(name, objective)
    if sets is None:
        sets = {
            name: adapter_set(name, objective, loaded) for name, objective in objectives.items()
        }
    stock: Any = getattr(pipeline, "stock_class", type(pipeline))
    attached: Any = copy.copy(pipeline)
    attached.__class__ = attached_class(WithObjectives, stock)
    attached._objectives, attached._hooks, attached._parallel = dict(objectives), {}, None
    attached._accelerator, attached._base_set = accelerator, sets.get(NAMELESS, ())
    attached._sets = {name: sets[name] for name in objectives}
    attached._capture = getattr(pipeline, "_capture", "auto")
    made: WithObjectives = attached
    return made


def attach_as_it_is(
    pipeline: DiffusionPipeline, objectives: Mapping[str, Objective] | None, *changes: object
) -> Any:  # noqa: ANN401 - of the pipeline's class, with objectives
    """`attach`, where `from_pipe` is asked for changes, too, which are refused.

    Raises:
        ValueError: There are changes.
    """
    if any(changes):
        raise ValueError(
            f"{type(pipeline).__name__} gets objectives as it is: give it other components or "
            "another dtype before"
        )
    return attach(pipeline, objectives)

# SPDX-License-Identifier: Apache-2.0
"""`FusedModel` for any pipeline with objectives: its own loop, called once for each system."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from msdda_fast.adapters.files import AdapterFile
from msdda_fast.adapters.formats import StockFormat
from msdda_fast.adapters.soup import merged_sets, temporarily
from msdda_fast.adapters.sources import adapter_files
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.engine.noise import image_seeds
from msdda_fast.errors import AdapterMismatch, UnknownObjective, UnsupportedNetwork
from msdda_fast.levels import FlowNoise, TimestepRange
from msdda_fast.lora.soup import Merge
from msdda_fast.methods.model import BASE, Cost, Fusion, Level
from msdda_fast.methods.stock_levels import common_level, is_ddim, mixing_weights
from msdda_fast.methods.streams import chances
from msdda_fast.objective import Objective
from msdda_fast.pipelines.attach import WithObjectives, attach
from msdda_fast.pipelines.attach_files import DENOISERS, networks_of
from msdda_fast.pipelines.call_levels import call_levels
from msdda_fast.pipelines.row_arguments import row_arguments
from msdda_fast.pipelines.rows import Call
from msdda_fast.pipelines.stock_call import StockCall
from msdda_fast.pipelines.tasks import check_from_text
from msdda_fast.weights import preference_weights

__all__ = ["StockModel", "check_draws_images", "own_levels", "scheduler_of"]


def check_draws_images(pipe: WithObjectives) -> None:
    """Raise `UnsupportedNetwork` unless a pipeline draws images from prompts alone."""
    check_from_text(pipe.stock_class)
    call = StockCall.of(pipe.stock_class)
    if call.makes != "images":
        raise UnsupportedNetwork(f"{call.kind} draws {call.makes}, and rewards score images")
    call.check(("prompt", "num_inference_steps", "generator", "output_type"))


class StockModel:
    """`FusedModel` over a pipeline of any family; a context manager that restores its networks.

    Every system is a call of the pipeline on the same networks, with other objectives. What
    `generate` returns are the pipeline's images, which `decode` hands on. With a range of
    timesteps the base's rows run in every step, and count.

    Args:
        pipe: Its objectives are the aligned models.
        prompts: B texts.
        weights: Preference, by objective.
        seeds: One per prompt.
        num_steps: T.
        guidance_scale: Of the call; None: the pipeline's default.

    Raises:
        UnsupportedNetwork: As `check_draws_images`; or the family has no guidance.
        InvalidSchedule: Some objectives have a noise level and others have none.
        UnknownObjective, InvalidWeights, InvalidShape: As `Method.__call__`.
    """

    def __init__(
        self,
        pipe: WithObjectives,
        prompts: Sequence[str],
        weights: Mapping[str, float],
        seeds: Sequence[int],
        *,
        num_steps: int,
        guidance_scale: float | None = None,
    ) -> None:
        check_draws_images(pipe)
        own = pipe.objectives
        if unknown := [name for name in weights if name not in own]:
            raise UnknownObjective(f"unknown objective {unknown[0]!r}; known: {', '.join(own)}")
        row = preference_weights(dict(weights), list(weights), 1)[0]
        self.preference = dict(zip(weights, row.tolist(), strict=True))
        self.etas = own_levels(pipe)
        self.batch_size = len(prompts)
        self.cost = Cost()
        self._scheduler = scheduler_of(pipe)
        self._seeds = image_seeds(list(seeds), self.batch_size)
        self._pipe, self._networks = pipe, networks_of(pipe)
        self._sets = {BASE: (), **pipe.adapter_sets}
        self._ranges = {name: o.timesteps for name, o in own.items() if o.timesteps is not None}
        self._call: dict[str, Any] = {
            "prompt": list(prompts), "num_inference_steps": num_steps, "seed": self._seeds,
        }  # fmt: skip
        self._call |= StockCall.of(pipe.stock_class).arguments(guidance_scale=guidance_scale)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def level(self, eta: float | None) -> Level:
        """Return eta where levels are DDIM's, else the level with the noise of MSDDA."""
        if eta is not None and is_ddim(self._scheduler):
            return eta
        return common_level(self._scheduler, self.preference, self.etas)

    def remapped(self) -> tuple[dict[str, float], Level]:
        """Return the weights and the level at which mixed predictions are MSDDA's."""
        return mixing_weights(self.preference, self.etas), self.level(None)

    def generate(
        self,
        weights: Mapping[str, float],
        etas: Mapping[str, Level],
        *,
        fusion: Fusion = "posterior",
        extrapolate: bool = False,
    ) -> Tensor:
        """Return images (B, 3, H, W) of several models; "posterior" is the rule's own fusion."""
        active = {name: weight for name, weight in weights.items() if weight != 0}
        mixed = "eps" if fusion == "eps" else None
        return self._drawn(active, active, etas, fusion=mixed, extrapolate=extrapolate)

    def switched(self, names: Sequence[str], choose: Callable[[int], Tensor], eta: Level) -> Tensor:
        """Return images of steps of one model each; all networks run, for the chosen to count."""

        def weights(k: int) -> Tensor:
            return torch.nn.functional.one_hot(choose(k), len(names)).double()

        return self._drawn(names, weights, dict.fromkeys(names, eta))

    def uniform(self, k: int, *, purpose: int) -> Tensor:
        """Return one random number in (0, 1) per sample for a choice at step k, (B,)."""
        return chances(self._seeds, k, purpose)

    def decode(self, x_0: Tensor) -> Tensor:
        """Return the images as they are: the pipeline has decoded them."""
        self.cost.decodes += len(x_0)
        return x_0

    def soup(
        self, weights: Mapping[str, float], merge: Merge = "product", rotation: int | None = None
    ) -> str:
        """Make the model of averaged adapters and return its name."""
        active = {name: weight for name, weight in weights.items() if weight != 0}
        if len(active) == 1:
            return next(iter(active))
        ranges = {name: self._ranges.get(name) for name in active}
        if len(set(ranges.values())) > 1:
            raise AdapterMismatch(
                f"models that act in different timesteps have no average that is one: {ranges}"
            )
        sets, name = {name: self._sets[name] for name in active}, self._new_name("soup")
        adapter = merged_sets(name, self._networks, sets, list(active.values()), merge, rotation)
        self._put(adapter, next(iter(ranges.values())))
        return name

    def load(self, path: str | Path, timesteps: TimestepRange | None = None) -> str:
        """Make a model of the base and the adapter at `path`, and return its name."""
        name = self._new_name("loaded")
        (file,) = adapter_files(Objective(path), {})
        config = getattr(self._networks.get("unet"), "config", None)
        kind = StockFormat(self._pipe.stock_class, tuple(self._networks), config)
        self._put(AdapterFile.read(name, file, kind), timesteps)
        return name

    def _put(self, adapter: AdapterFile, timesteps: TimestepRange | None) -> None:
        self._stack.enter_context(temporarily(adapter, self._networks))
        self._sets[adapter.name] = ((adapter.name, 1.0),)
        if timesteps is not None:
            self._ranges[adapter.name] = timesteps

    def _new_name(self, kind: str) -> str:
        taken = {*self._sets, *adapter_names(*self._networks.values())}
        return next(name for i in count() if (name := f"{kind}-{i}") not in taken)

    def _drawn(
        self,
        names: Sequence[str] | Mapping[str, float],
        weights: Any,  # noqa: ANN401 - of the pipeline's call
        levels: Mapping[str, Level],
        **options: Any,  # noqa: ANN401 - of the pipeline's call
    ) -> Tensor:
        objectives = {name: _objective(levels[name], self._ranges.get(name)) for name in names}
        sets = {name: self._sets[name] for name in names}
        view: Any = attach(self._pipe, objectives, sets)
        view._hooks = self._pipe._hooks  # networks are verified once
        bare = not any(self._ranges.get(name) for name in names)
        copies = 1 if not any(sets.values()) else len(sets) + (0 if bare else 1)
        with _counted(self._networks) as rows:
            result = view(**self._call, **options, weights=weights, output_type="pt")
        images: Tensor = result.images
        self.cost.unet_forwards += copies * sum(rows)
        return images.float().cpu()


def scheduler_of(pipe: Any) -> Any:  # noqa: ANN401 - of a pipeline of any class
    """Return the scheduler of a pipeline."""
    return pipe.scheduler


def own_levels(pipe: WithObjectives) -> dict[str, Level]:
    """Return the noise level of each objective: DDIM's eta, noise of flow models, or None for all.

    Raises:
        InvalidSchedule: Some have noise and others have none.
    """
    own = pipe.objectives
    levels: Any = call_levels(scheduler_of(pipe), own, own, None)
    return dict(zip(own, levels or [None] * len(own), strict=True))


def _objective(level: Level, timesteps: TimestepRange | None) -> Objective:
    if level is None or isinstance(level, FlowNoise):
        return Objective(noise=level, timesteps=timesteps)
    return Objective(eta=level, timesteps=timesteps)


@contextmanager
def _counted(networks: Mapping[str, nn.Module]) -> Iterator[list[int]]:
    """Yield a list that gets the rows of each call of a denoiser, as the pipeline makes it."""
    rows: list[int] = []
    with ExitStack() as stack:
        for name, network in networks.items():
            if name in DENOISERS:
                handle = network.register_forward_pre_hook(partial(_count, rows), with_kwargs=True)
                stack.callback(handle.remove)
        yield rows


def _count(rows: list[int], network: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
    names = list(inspect.signature(network.forward).parameters)
    rows.append(Call.of(names, args, kwargs, row_arguments(network)).rows)

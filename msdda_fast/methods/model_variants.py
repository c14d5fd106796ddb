# SPDX-License-Identifier: Apache-2.0
"""The networks of a `PipelineModel`: the pipeline's own, soups of them, and loaded adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from torch import nn

from msdda_fast.adapters.files import AdapterFile
from msdda_fast.adapters.formats import StableDiffusionFormat
from msdda_fast.adapters.soup import make_soup, temporarily
from msdda_fast.adapters.sources import adapter_files
from msdda_fast.adapters.switching import AdapterSwitch, adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.errors import AdapterMismatch
from msdda_fast.levels import TimestepRange
from msdda_fast.lora.soup import Merge
from msdda_fast.methods.model import BASE
from msdda_fast.objective import Objective
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["ModelVariants"]


class ModelVariants:
    """Models over one pipeline, by name; `close` takes away those that were made here.

    Args:
        pipe: Its objectives are the aligned models; the base joins them as `BASE`.
        guidance: Scale of each objective.

    Attributes:
        variants: Network and adapter of each model.
        guidance: Scale of each model.
        made: Names of the models that were made here.
        switch: Runs a variant's network with its adapter.
    """

    def __init__(self, pipe: MSDDAPipeline, guidance: Mapping[str, float]) -> None:
        self.variants = {**pipe.variants}
        self.variants.setdefault(BASE, Variant(pipe.unet, None))
        self.guidance = {**guidance}
        # the base as the aligned models are sampled, or they would differ in more than alignment
        self.guidance.setdefault(BASE, next(iter(self.guidance.values())))
        self.made: set[str] = set()
        self._ranges = {name: o.timesteps for name, o in pipe.objectives.items() if o.timesteps}
        self._own = pipe.objectives
        self._pipe = pipe
        self._stack = ExitStack()

    def open(self) -> None:
        """Attach the adapters; before any network runs."""
        self.switch = self._stack.enter_context(self._new_switch())

    def close(self) -> None:
        """Restore the networks."""
        self._stack.close()

    def acting(self, name: str, t: float) -> str:
        """Return whose network runs at timestep t: the base's outside of the model's timesteps."""
        first, last = self._ranges.get(name, (-math.inf, math.inf))
        return name if first <= t <= last else BASE

    def objective(self, name: str) -> Objective:
        """Return a model as an objective, by which a pipeline with these variants samples it."""
        return self._own.get(name) or Objective(timesteps=self._ranges.get(name))

    def soup(self, weights: Mapping[str, float], merge: Merge, rotation: int | None) -> str:
        """Make the model of averaged weights and return its name; see `LatentModel.soup`."""
        active = {name: weight for name, weight in weights.items() if weight != 0}
        if len(active) == 1:
            return next(iter(active))
        ranges = {name: self._ranges.get(name) for name in active}
        if len(set(ranges.values())) > 1:
            raise AdapterMismatch(
                f"models that act in different timesteps have no average that is one: {ranges}"
            )
        variants = {name: self.variants[name] for name in active}
        shares, name = list(active.values()), self._new_name("soup")
        soup = make_soup(name, variants, shares, merge, self._pipe.text_encoder, rotation)
        scales = [self.guidance[n] for n in active]
        # from the least one, so that equal scales are not rounded
        above = (w * (g - min(scales)) for w, g in zip(shares, scales, strict=True))
        self.guidance[name] = min(scales) + sum(above)
        self._act_within(name, next(iter(ranges.values())))
        if isinstance(soup, AdapterFile):
            self._put(soup, next(iter(variants.values())).network)
        else:
            self._add(name, Variant(soup, None))
        return name

    def load(self, path: str | Path, timesteps: TimestepRange | None) -> str:
        """Make a model of the base and the adapter at `path`; see `LatentModel.load`."""
        name = self._new_name("loaded")
        (file,) = adapter_files(Objective(path), {})
        self._put(
            AdapterFile.read(name, file, StableDiffusionFormat(self._pipe.unet)), self._pipe.unet
        )
        self.guidance[name] = self.guidance[BASE]
        self._act_within(name, timesteps)
        return name

    def _act_within(self, name: str, timesteps: TimestepRange | None) -> None:
        if timesteps is not None:
            self._ranges[name] = timesteps

    def _put(self, adapter: AdapterFile, network: nn.Module) -> None:
        networks = {"unet": network, "text_encoder": self._pipe.text_encoder}
        self._stack.enter_context(temporarily(adapter, networks))
        self._add(adapter.name, Variant(network, adapter.name))

    def _add(self, name: str, variant: Variant) -> None:
        self.variants[name] = variant
        self.made.add(name)
        # the layers of the networks are others now
        self.switch = self._stack.enter_context(self._new_switch())

    def _new_name(self, kind: str) -> str:
        networks = [self._pipe.text_encoder, *(v.network for v in self.variants.values())]
        taken = {*self.variants, *adapter_names(*networks)}
        return next(name for i in count() if (name := f"{kind}-{i}") not in taken)

    def _new_switch(self) -> AdapterSwitch:
        return AdapterSwitch.of(self.variants.values(), self._pipe.text_encoder)

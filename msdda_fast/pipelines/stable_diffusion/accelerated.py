# SPDX-License-Identifier: Apache-2.0
"""The accelerator of a pipeline, and the base that includes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from msdda_fast.adapters.variant import Variant
from msdda_fast.pipelines.accelerator import Accelerator
from msdda_fast.pipelines.request import check_steps

__all__ = ["BASE", "Accelerated"]

BASE = ""  #: The base among the variants of a request; no objective has this name.
NUM_STEPS = 50  # diffusers' default


class Accelerated:
    """Mixin of a pipeline whose objectives may include an accelerator."""

    unet: Any  # of the pipeline
    _accelerator: Accelerator | None
    _base: Variant

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The network and the active adapter of each objective."""
        raise NotImplementedError

    @property
    def accelerator(self) -> Accelerator | None:
        """The adapter for few steps that all objectives and the base include; None: none."""
        return self._accelerator

    @property
    def base_variant(self) -> Variant:
        """The base, as `unet` is now: it stands in for objectives where they do not act."""
        return replace(self._base, network=self.unet)

    @property
    def all_variants(self) -> dict[str, Variant]:
        """The variants of the objectives, and the base as `BASE`."""
        return {**self.variants, BASE: self.base_variant}

    def checked_steps(self, num_steps: int | None) -> int:
        """Return T; None stands for what the accelerator was made for, or 50.

        Raises:
            InvalidSchedule: It is no positive integer.
        """
        if num_steps is None:
            return NUM_STEPS if self._accelerator is None else self._accelerator.steps
        return check_steps(num_steps)

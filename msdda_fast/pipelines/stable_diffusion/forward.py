# SPDX-License-Identifier: Apache-2.0
"""How the objectives' networks run: all in one batched forward, or one after another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from msdda_fast.adapters.variant import Variant
from msdda_fast.batched.options import DEFAULTS, BatchedOptions
from msdda_fast.engine.graph import Capture
from msdda_fast.engine.parallel import ObjectiveParallel
from msdda_fast.errors import AdapterMismatch, UnsupportedNetwork
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler, Compile

__all__ = ["Forward", "ForwardSettings", "Runner"]

logger = logging.getLogger(__name__)

#: "batched": one forward for all objectives; "sequential": one after another; "auto": batched where
#: the objectives share a network that can.
Forward: TypeAlias = Literal["auto", "batched", "sequential"]


@dataclass(frozen=True, kw_only=True)
class ForwardSettings:
    """How the objectives' networks run; fields as in `MSDDAPipeline.set_forward`.

    Raises:
        ValueError: `forward`, `capture` or `compile` is unknown.
    """

    forward: Forward = "auto"
    capture: Capture = "auto"
    compile: Compile = "auto"
    options: BatchedOptions = DEFAULTS

    def __post_init__(self) -> None:
        for name, value, known in (
            ("forward", self.forward, ("auto", "batched", "sequential")),
            ("capture", self.capture, ("auto", "required", "off")),
            ("compile", self.compile, ("auto", "openvino", True, False)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")


class Runner:
    """Builds and keeps the batched forward of some variants, and rebuilds it when they change.

    Args:
        settings: How to build it.
        capacity: Most shapes of requests kept.
    """

    def __init__(self, settings: ForwardSettings, *, capacity: int = 8) -> None:
        self.settings = settings
        self._capacity = capacity
        self._sampler: CapturedSampler | None = None
        self._said = ""

    def keep_faster(self) -> None:
        """With `compile="auto"`, time the steps built so far, and keep the faster way of each."""
        if self._sampler is not None:
            self._sampler.keep_faster()

    def sampler(
        self,
        variants: Sequence[Variant],
        *,
        required: bool,
        parallel: ObjectiveParallel | None = None,
    ) -> CapturedSampler | None:
        """Return the batched forward of the variants; None: they run one after another.

        Args:
            variants: One per objective.
            required: Never return None, whatever the settings say.
            parallel: The processes that share the objectives; None: only this one.

        Raises:
            AdapterMismatch, UnsupportedNetwork: It is required, or the settings say "batched", but
                it cannot be built.
            CaptureError: Graphs are required on a device without them.
        """
        settings = self.settings
        if settings.forward == "sequential" and not required:
            return None
        try:
            _check_context(variants)
            kept = self._sampler
            if kept is not None and kept.parallel is parallel and kept.is_current(variants):
                return kept
            del kept
            self._sampler = None  # free the old one before building anew
            self._sampler = CapturedSampler(
                variants,
                options=settings.options,
                capture=settings.capture,
                compile=settings.compile,
                capacity=self._capacity,
                parallel=parallel,
            )
        except (AdapterMismatch, UnsupportedNetwork) as error:
            if required or settings.forward == "batched":
                raise
            if str(error) != self._said:
                logger.warning("objectives run one after another: %s", error)
                self._said = str(error)
            return None
        return self._sampler


def _check_context(variants: Sequence[Variant]) -> None:
    """Raise `UnsupportedNetwork` under autocast, which casts inside of layers."""
    device = variants[0].network.device.type
    if torch.is_autocast_enabled(device):
        raise UnsupportedNetwork(
            f"torch.autocast is on for {device}; networks loaded in that dtype run batched"
        )

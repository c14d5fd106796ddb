# SPDX-License-Identifier: Apache-2.0
"""Which predictor a generation runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdda_fast.adapters.switching import AdapterSwitch
from msdda_fast.engine.noise import NoiseSource
from msdda_fast.errors import InvalidMode
from msdda_fast.pipelines.prompts import Prompts
from msdda_fast.pipelines.stable_diffusion.captured import CapturedSampler
from msdda_fast.pipelines.stable_diffusion.modes import Mode
from msdda_fast.pipelines.stable_diffusion.parallel import ParallelPredictor, generation
from msdda_fast.pipelines.stable_diffusion.prediction import Predictor, SequentialPredictor
from msdda_fast.steps.coefficients import CoefficientTable

if TYPE_CHECKING:
    from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline

__all__ = ["choose_predictor"]


@contextmanager
def choose_predictor(
    pipe: MSDDAPipeline,
    switch: AdapterSwitch,
    prompts: Prompts,
    table: CoefficientTable,
    noise: NoiseSource,
    latents: Tensor | None,
    mode: Mode = "exact",
) -> Iterator[Predictor | CapturedSampler]:
    """Give one generation what runs its networks, in this process or in all of a group.

    Alone, and with a float32 state: the batched step where the objectives can share a forward.
    Approximate modes have no other.

    Args:
        pipe: Its variants, and its `parallel` if it has any.
        switch: Has the adapters of every network, and has been entered.
        prompts, table, noise, latents: The request, which the processes compare.
        mode: Of the request.

    Raises:
        AdapterMismatch, UnsupportedNetwork: The mode is approximate, and the objectives cannot
            share a forward.
        InvalidMode: It is approximate, and the state is float64.
        RankLost, RanksDiffer: See `ObjectiveParallel.generation`.
    """
    sampler, narrow = None, table.rows.dtype == torch.float32
    if mode != "exact" and not narrow:
        raise InvalidMode(f'a float64 network samples with mode="exact" only, got {mode!r}')
    if pipe.parallel is None and narrow:
        sampler = pipe.captured_sampler(required=mode != "exact")
    if sampler is not None:
        yield sampler
        return
    dtype = pipe.unet.dtype
    local: Predictor = SequentialPredictor(list(pipe.variants.values()), switch, dtype)
    if pipe.parallel is None:
        yield local
        return
    with generation(pipe.parallel, pipe, prompts, table, noise, latents):
        yield ParallelPredictor(pipe.parallel, local, dtype)

# SPDX-License-Identifier: Apache-2.0
"""Checks requests against a model on the caller's thread, before they are queued."""

from __future__ import annotations

import copy
import inspect
import math
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from msdda_fast.batching.limits import Limits, integer
from msdda_fast.batching.request import ImageRequest
from msdda_fast.batching.ticket import Shape, Ticket, described
from msdda_fast.engine.noise import image_seeds
from msdda_fast.errors import InvalidRequest, InvalidWeights, MSDDAError
from msdda_fast.kernels.counter_noise import as_seeds, seed_list
from msdda_fast.pipelines import request as call
from msdda_fast.pipelines.preferences import preferences
from msdda_fast.pipelines.prompt_length import check_text
from msdda_fast.pipelines.schedulers import sampling_levels
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.steps.coefficients import CoefficientTable
from msdda_fast.steps.schedulers import scheduler_rule
from msdda_fast.steps.table import coefficient_table
from msdda_fast.types import ZeroVariancePolicy
from msdda_fast.weights import preference_schedule

__all__ = ["Admission"]


class Admission:
    """Turns requests into tickets; thread-safe.

    Args:
        pipe: The pipeline whose objectives, scheduler and tokenizer requests are checked against.
        limits: Bounds of one request.
    """

    def __init__(self, pipe: MSDDAPipeline, limits: Limits) -> None:
        self._pipe, self._limits = pipe, limits
        # tokenizers are not thread-safe, and the pipeline's own is busy with batches
        self._tokenizer = copy.deepcopy(pipe.tokenizer)
        self._tokenizing = threading.Lock()

    def tickets(
        self,
        request: ImageRequest,
        count: int = 1,
        *,
        client: str | None = None,
        zero_variance: ZeroVariancePolicy = "error",
    ) -> list[Ticket]:
        """Check a request for `count` images, with consecutive seeds, and return their tickets.

        Args:
            request: What to draw.
            count: How many images.
            client: Who asks; see `Engine.submit_images`.
            zero_variance: What to do where eta = 0 is mixed with eta > 0; see
                `msdda_fast.steps.shares.fusion_shares`.

        Raises:
            UnknownObjective, InvalidWeights, InvalidSchedule, InvalidShape, ZeroVariance,
            InvalidRequest: As in the pipeline's call; `field` of the error names the wrong field.
        """
        if not isinstance(request, ImageRequest):
            raise InvalidRequest(f"expected an ImageRequest, got {type(request).__name__}")
        now = time.monotonic()
        for name in ("prompt", "negative_prompt"):
            with _field(name):
                self._check_text(getattr(request, name))
        with _field("seed"):
            seeds = _seeds(request.seed, count)
        with _field("timeout_s"):
            expires = now + _timeout(request.timeout_s)
        with _field("on_step"):
            _check_callback(request.on_step)
        shape = self._shape(request, count)
        table = self._table(request, shape.steps, zero_variance)
        shape = shape._replace(with_base=table.has_base)
        with _field("preview_steps"):
            previews = _previews(request.preview_steps, len(table))
        return [
            Ticket(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                seed=seed,
                table=table,
                shape=shape,
                index=index,
                arrived=now,
                expires=expires,
                on_step=request.on_step,
                preview_steps=previews,
                client=client,
            )
            for index, seed in enumerate(seeds)
        ]

    def _shape(self, request: ImageRequest, count: int) -> Shape:
        config, factor = self._pipe.unet.config, self._pipe.vae_scale_factor
        with _field("height"):
            rows = call.latent_shape(1, config, factor, request.height, None)[2]
        with _field("width"):
            columns = call.latent_shape(1, config, factor, None, request.width)[3]
        height, width = rows * factor, columns * factor
        with _field("height"):
            if height * width > self._limits.max_pixels:
                raise InvalidRequest(
                    f"an image of {height} x {width} pixels has more than max_pixels="
                    f"{self._limits.max_pixels}"
                )
        with _field("num_inference_steps"):
            steps = integer("num_inference_steps", request.num_inference_steps)
            scheduler_rule(self._pipe.scheduler, steps)
            if (cost := count * height * width * steps) > self._limits.max_cost:
                raise InvalidRequest(
                    f"{count} images x {height} x {width} pixels x {steps} steps = {cost} is more "
                    f"than max_cost={self._limits.max_cost}: ask for fewer images, pixels or steps"
                )
        return Shape(height, width, steps)

    def _table(
        self, request: ImageRequest, steps: int, zero_variance: ZeroVariancePolicy
    ) -> CoefficientTable:
        pipe = self._pipe
        objectives = pipe.objectives
        with _field("guidance_scale"):
            guidance = call.objective_guidance(objectives, request.guidance_scale)
        with _field("weights"):
            preference_schedule(request.weights, list(objectives), 1, steps)
        with _field("strength"):
            prefers = preferences(
                objectives,
                request.weights,
                request.strength,
                None,
                batch_size=1,
                num_steps=steps,
            )
        with _field("weights"):
            return coefficient_table(
                pipe.scheduler,
                steps,
                etas=sampling_levels(pipe.scheduler, objectives, None),
                **prefers,
                guidance_scale=guidance,
                zero_variance=zero_variance,
                dtype=torch.float64 if pipe.unet.dtype == torch.float64 else torch.float32,
            )

    def _check_text(self, text: Any) -> None:  # noqa: ANN401 - it is what is checked
        if not isinstance(text, str):
            raise InvalidRequest(f"expected text, got {type(text).__name__}")
        with self._tokenizing:
            check_text(self._tokenizer, text)


@contextmanager
def _field(name: str) -> Iterator[None]:
    """Set `field` on errors raised in the context, and give those of others a name."""
    try:
        yield
    except MSDDAError as error:
        error.field = name
        raise
    except Exception as error:  # of a callable, or of a value of an unexpected type
        kind = InvalidWeights if name == "weights" else InvalidRequest
        refusal = kind(f"{name} cannot be used: {described(error)}")
        refusal.field = name
        raise refusal from error


def _seeds(seed: int | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(63)
    try:
        as_seeds([seed], 1, torch.device("cpu"))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return seed_list([seed]) if count == 1 else image_seeds(seed, count)


def _check_callback(on_step: object) -> None:
    if on_step is None:
        return
    if not callable(on_step) or inspect.iscoroutinefunction(on_step):
        raise InvalidRequest(f"on_step must be None or a plain function, got {on_step!r}")


def _previews(steps: Collection[int], count: int) -> frozenset[int]:
    if not isinstance(steps, Collection):  # an iterator may have no end
        raise InvalidRequest(f"preview_steps must be a list of steps, got {steps!r}")
    for step in steps:
        if step not in range(1, count + 1):
            raise InvalidRequest(f"preview_steps must be from 1 to {count}, got {step}")
    return frozenset(steps)


def _timeout(seconds: float | None) -> float:
    if seconds is None:
        return math.inf
    if not seconds > 0:
        raise InvalidRequest(f"timeout_s must be positive, got {seconds!r}")
    return seconds

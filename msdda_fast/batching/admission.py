# SPDX-License-Identifier: Apache-2.0
"""Checks requests against a model on the caller's thread, before they are queued."""

from __future__ import annotations

import inspect
import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping

import torch

from msdda_fast.batching.checks import Checks, field
from msdda_fast.batching.request import ImageRequest
from msdda_fast.batching.ticket import Ticket
from msdda_fast.engine.noise import image_seeds
from msdda_fast.errors import InvalidRequest
from msdda_fast.kernels.counter_noise import as_seeds, seed_list
from msdda_fast.types import ZeroVariancePolicy

__all__ = ["Admission"]


class Admission:
    """Turns requests into tickets; thread-safe.

    Args:
        checks: Returns the checks of the pipeline that a request is for.
    """

    def __init__(self, checks: Callable[[ImageRequest], Checks]) -> None:
        self._checks = checks

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
        checks = self._checks(request)
        for name in ("prompt", "negative_prompt"):
            with field(name):
                checks.check_text(getattr(request, name))
        with field("seed"):
            seeds = _seeds(request.seed, count)
        with field("timeout_s"):
            expires = now + _timeout(request.timeout_s)
        with field("on_step"):
            _check_callback(request.on_step)
        with field("masks"):
            _check_mapping(request.masks)
        shape, own = checks.of(request, count, zero_variance)
        with field("preview_steps"):
            previews = _previews(request.preview_steps, shape.steps)
        return [
            Ticket(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                seed=seed,
                shape=shape,
                index=index,
                arrived=now,
                expires=expires,
                on_step=request.on_step,
                preview_steps=previews,
                client=client,
                **own,
            )
            for index, seed in enumerate(seeds)
        ]


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


def _check_mapping(masks: object) -> None:
    if masks is not None and not isinstance(masks, Mapping):  # a list is of a call's prompts
        raise InvalidRequest(f"masks must be a mapping or None, got {type(masks).__name__}")


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

# SPDX-License-Identifier: Apache-2.0
"""One image on its way through an engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from msdda_fast.batching.request import GeneratedImage, Progress
from msdda_fast.errors import InvalidRequest
from msdda_fast.pipelines.call_check import LevelKind
from msdda_fast.pipelines.tasks import Task
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = [
    "Chore",
    "DrawnLater",
    "RequestTask",
    "Shape",
    "StockImage",
    "Ticket",
    "described",
    "set_outcome",
]

logger = logging.getLogger(__name__)

#: What a request asks for: an image from a text alone, or a task that starts from an image.
RequestTask: TypeAlias = Literal["text"] | Task


class Shape(NamedTuple):
    """What all images of a batch have in common: height and width in pixels, and T.

    Attributes:
        with_base: Whether the base takes part in it, which strength asks for.
        task: Which pipeline draws it.
        call: Arguments of a stock pipeline's call that are one for all.
        has_negative: Whether negative prompts are given to it.
        levels: The kind of its noise levels, with a stock pipeline.
        by_range: Whether its weights are by ranges of timesteps, with a stock pipeline.
        alone: A number of its own for an image that cannot share a call.
    """

    height: int
    width: int
    steps: int
    with_base: bool = False
    task: RequestTask = "text"
    call: tuple[tuple[str, Any], ...] = ()
    has_negative: bool = False
    levels: LevelKind | None = None
    by_range: bool = False
    alone: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StockImage:
    """What one image brings to the call of a stock pipeline with objectives.

    Attributes:
        weights: (T, 1, M) float64, rows on the simplex; or a mapping from ranges of timesteps to
            (M,) numbers.
        strength: Of the objectives, (1, M) float64; None: all are 1.
        image, mask_image: PIL images of the request's size, or None.
        masks: As in the request.
    """

    weights: Tensor | Mapping[Any, list[float]]
    strength: Tensor | None
    image: Any
    mask_image: Any
    masks: Mapping[str, Any] | None


class DrawnLater(Future[GeneratedImage]):
    """A future that nobody can wait for who keeps the engine's thread waiting meanwhile.

    Attributes:
        would_wait_forever: Whether the engine waits for the calling thread.
    """

    would_wait_forever: Callable[[], bool] = staticmethod(lambda: False)

    def result(self, timeout: float | None = None) -> GeneratedImage:
        """Return the image, or raise what it ended with; a callback can only wait with a timeout.

        Raises:
            InvalidRequest: The caller is a callback for which the engine waits.
        """
        self._check(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the request ended with; arguments and errors as in `result`."""
        self._check(timeout)
        return super().exception(timeout)

    def _check(self, timeout: float | None) -> None:
        if timeout is None and not self.done() and self.would_wait_forever():
            raise InvalidRequest(
                "a callback cannot wait for this image: the engine draws it after the callback "
                "has returned"
            )


@dataclass(slots=True, weakref_slot=True, eq=False, kw_only=True)
class Ticket:
    """A checked request for one image, with the future that its caller holds.

    The future can be cancelled until it gets its outcome, set once by the caller that `claim`s it.

    Attributes:
        prompt, negative_prompt, seed: Those of this image.
        table: Coefficients of its T steps, B = 1, on the host; of Stable Diffusion's own pipeline.
        stock: What it brings to the call of a stock pipeline instead.
        shape: What must be the same within a batch.
        index: Position of this image in its request, from 0.
        arrived: When it was submitted, in seconds of `time.monotonic`.
        expires: When it expires, likewise; infinity: never.
        on_step, preview_steps: As in `ImageRequest`.
        client: Whose turn it takes in the queue; None: nobody's in particular.
    """

    prompt: str
    negative_prompt: str
    seed: int
    shape: Shape
    index: int
    arrived: float
    expires: float
    on_step: Callable[[Progress], object] | None
    preview_steps: Collection[int]
    client: str | None
    table: CoefficientTable | None = None
    stock: StockImage | None = None
    future: DrawnLater = field(default_factory=DrawnLater)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_claimed: bool = False

    def claim(self) -> bool:
        """Return True to the first caller, who must set the outcome; False if cancelled."""
        with self._lock:
            if self._is_claimed:
                return False
            self._is_claimed = True
        return self.future.set_running_or_notify_cancel()

    @property
    def is_open(self) -> bool:
        """Whether the future has no outcome yet and was not cancelled."""
        return not self.future.done()


class Chore:
    """Other work for the engine's thread, done between two batches.

    Attributes:
        future: Gets the outcome of the work.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.future: Future[None] = Future()
        self._work = work

    def run(self) -> None:
        """Do the work and set the future; nothing it raises goes further."""
        try:
            self._work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(None)


def set_outcome(future: Future[GeneratedImage], outcome: GeneratedImage | Exception) -> None:
    """Set a claimed future; what its callbacks raise is logged and goes no further."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except BaseException:  # futures let through what is no Exception, such as SystemExit
        logger.exception("a callback of a future raised")


def described(error: BaseException) -> str:
    """Return the type and message of an error, whatever its own `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__

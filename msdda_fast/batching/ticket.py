# SPDX-License-Identifier: Apache-2.0
"""One image on its way through an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from msdda_fast.batching.request import GeneratedImage, Progress
from msdda_fast.steps.coefficients import CoefficientTable

__all__ = ["Chore", "Shape", "Ticket"]


class Shape(NamedTuple):
    """What images of one batch agree in: sides in pixels, and T."""

    height: int
    width: int
    steps: int


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """A checked request for one image, with the future that its caller holds.

    The future stays cancellable until it gets its outcome, which happens once: whoever `claim`s.

    Attributes:
        prompt, negative_prompt, seed: Of this image.
        table: Coefficients of its T steps, B = 1, on the host.
        shape: What must agree within a batch.
        index: Which image of its request this is.
        arrived: When it was submitted, seconds of `time.monotonic`.
        expires: When it is given up, likewise; infinite for never.
        on_step, preview_steps: See `ImageRequest`.
    """

    prompt: str
    negative_prompt: str
    seed: int
    table: CoefficientTable
    shape: Shape
    index: int
    arrived: float
    expires: float
    on_step: Callable[[Progress], object] | None
    preview_steps: Collection[int]
    future: Future[GeneratedImage] = field(default_factory=Future)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_claimed: bool = False

    def claim(self) -> bool:
        """Whether the caller is to give the future its outcome: the first one, unless cancelled."""
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
    """Something else for the engine's thread to do, between two batches.

    Attributes:
        future: Gets its outcome.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.future: Future[None] = Future()
        self._work = work

    def run(self) -> None:
        """Do it."""
        try:
            self._work()
        except BaseException as error:
            self.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.future.set_result(None)

# SPDX-License-Identifier: Apache-2.0
"""What the routes of one app share: the source of images, its limits, and whether it is ready."""

from __future__ import annotations

import base64
import io
import logging
import math
from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any

from PIL import Image

from msdda_fast.batching.engine import Engine
from msdda_fast.batching.request import GeneratedImage, ImageRequest
from msdda_fast.batching.stats import EngineStats
from msdda_fast.engine.buffers import padded_steps
from msdda_fast.errors import EngineClosed, MSDDAError
from msdda_fast.serve.facts import Facts
from msdda_fast.serve.metrics import Metrics
from msdda_fast.serve.refusals import Refusal, of_engine
from msdda_fast.serve.settings import ServeSettings, sides

__all__ = ["EngineService", "Service", "encoded"]

logger = logging.getLogger("msdda_fast.serve")


class Service(ABC):
    """A source of images within the limits of an operator, wherever they are drawn.

    Args:
        settings: Limits of the service.
        facts: What is served.

    Raises:
        ValueError: An image of one of the sizes exceeds `max_cost`.

    Attributes:
        metrics: The metrics of this app.
    """

    def __init__(self, settings: ServeSettings, facts: Facts) -> None:
        self.settings, self.facts, self.sizes = settings, facts, list(facts.sizes)
        for size in self.sizes:
            if settings.cost(1, settings.steps, size, self.sizes[0]) > settings.max_cost:
                raise ValueError(
                    f"max_cost={settings.max_cost:g} admits no image of {size} with "
                    f"{settings.steps} steps"
                )
        self.metrics = Metrics()

    @abstractmethod
    def warm(self) -> None:
        """Warm up; may take minutes, and runs on a thread of its own."""

    @abstractmethod
    async def is_serving(self) -> bool:
        """Return whether requests are accepted now."""

    @property
    @abstractmethod
    def has_failed(self) -> bool:
        """Whether this process can never serve again."""

    @property
    def is_restarting(self) -> bool:
        """Whether this process cannot draw at present, and is helping itself."""
        return False

    @abstractmethod
    async def submit(
        self, request: ImageRequest, count: int, client: str
    ) -> list[Future[GeneratedImage]]:
        """Queue `count` images for a client and return a future for each.

        Raises:
            Refusal: The request is invalid, or cannot be accepted now.
        """

    @abstractmethod
    async def stats(self) -> EngineStats:
        """Return the counts of all engines."""

    @abstractmethod
    def retry_after_s(self) -> int:
        """Estimate the whole seconds until a refused request may be accepted."""

    def refusal(self, error: BaseException) -> Refusal:
        """Translate the error that an image ended with for the client."""
        if isinstance(error, MSDDAError):
            return of_engine(error, self.retry_after_s())
        return Refusal(500, "internal error", code="internal", kind="server_error")

    def objectives(self) -> dict[str, Any]:
        """Return what a client may choose, and the limits."""
        settings = self.settings
        limits = ("max_steps", "max_images", "max_cost", "max_prompt_chars")
        return {
            "object": "list",
            "model": settings.model,
            **self.facts.described(),
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            **{name: getattr(settings, name) for name in limits},
        }


class EngineService(Service):
    """A service whose images are drawn by an engine in this process.

    Args:
        engine: Draws the images; the caller closes it.
        settings: Limits of the service.

    Raises:
        InvalidShape: The model cannot draw one of the sizes in the settings.
        UnsupportedNetwork: It makes videos.
        ValueError: A request may have more images than a client in the queue, or none of one of the
            sizes.

    Attributes:
        is_warm: Whether everything has been built and captured.
        failure: Why warming up failed; None if it has not.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        super().__init__(settings, Facts.of(engine, settings))
        if settings.max_images > engine.client_limit:
            raise ValueError(
                f"requests may have max_images={settings.max_images}, but one client only "
                f"client_limit={engine.client_limit} images in the queue"
            )
        self.engine = engine
        self.is_warm = False
        self.failure: str | None = None

    def warm(self) -> None:
        """Build and capture whatever a request may ask for; takes seconds to minutes."""
        # of each kind the fewest steps, and the default: a scheduler may not have the most
        counts = (*range(self.settings.max_steps, 0, -1), self.settings.steps)
        kinds = {padded_steps(steps): steps for steps in counts}
        try:
            for width, height in map(sides, self.sizes):
                for steps in kinds.values():
                    self.engine.prepare(height, width, steps)
        except EngineClosed:
            logger.info("closed before it was ready")
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            logger.exception("warming up failed")
        else:
            self.is_warm = True
            logger.info("ready", extra={"fields": {"sizes": self.sizes}})

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted now."""
        stats = self.engine.stats()
        return self.is_warm and not stats.is_closed and stats.restarting is None

    async def is_serving(self) -> bool:
        """Return whether requests are accepted now: `is_ready`."""
        return self.is_ready

    @property
    def has_failed(self) -> bool:
        """Whether warming up or the engine failed."""
        return (self.failure or self.engine.stats().failure) is not None

    @property
    def is_restarting(self) -> bool:
        """Whether the engine is being started anew."""
        return self.engine.stats().restarting is not None

    async def submit(
        self, request: ImageRequest, count: int, client: str
    ) -> list[Future[GeneratedImage]]:
        """Queue `count` images of the engine and return a future for each."""
        if not self.is_warm:
            raise Refusal(
                503, "the model is being prepared", code="not_ready", kind="server_error",
                retry_after_s=5,
            )  # fmt: skip
        try:
            return self.engine.submit_images(request, count, client=client)
        except MSDDAError as error:
            raise self.refusal(error) from error

    async def stats(self) -> EngineStats:
        """Return the engine's counts."""
        return self.engine.stats()

    def retry_after_s(self) -> int:
        """Estimate when the queue will be empty: its batches times the mean time of a batch."""
        stats = self.engine.stats()
        drawn = stats.completed / stats.batches if stats.batches else 1.0
        seconds = stats.drawing_s / stats.batches if stats.batches else 1.0
        return min(60, max(1, math.ceil(stats.waiting / max(1.0, drawn) * seconds)))


def encoded(image: Image.Image) -> str:
    """Return the image as a PNG in base64."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()

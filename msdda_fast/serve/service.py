# SPDX-License-Identifier: Apache-2.0
"""What the routes of one app share: what draws, its limits, and whether it is ready."""

from __future__ import annotations

import base64
import io
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from PIL import Image

from msdda_fast.batching.engine import Engine
from msdda_fast.batching.request import GeneratedImage, ImageRequest
from msdda_fast.batching.stats import EngineStats
from msdda_fast.engine.buffers import padded_steps
from msdda_fast.errors import MSDDAError
from msdda_fast.objective import Objective
from msdda_fast.pipelines.request import latent_shape
from msdda_fast.pipelines.stable_diffusion.pipeline import MSDDAPipeline
from msdda_fast.serve.metrics import Metrics
from msdda_fast.serve.refusals import Refusal, of_engine
from msdda_fast.serve.settings import ServeSettings, sides

__all__ = ["EngineService", "Service", "encoded", "lay_out"]

logger = logging.getLogger("msdda_fast.serve")


class Service(ABC):
    """Images with the limits of an operator, wherever they are drawn.

    Args:
        settings: Of the service.
        sizes: "WIDTHxHEIGHT" that may be asked for, the default first.
        objectives: Of the model, by the names that weights have.

    Attributes:
        metrics: Of this app.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        sizes: Sequence[str],
        objectives: Mapping[str, Objective],
    ) -> None:
        self.settings, self.sizes = settings, list(sizes)
        self._objectives = objectives
        self.metrics = Metrics()

    @abstractmethod
    def warm(self) -> None:
        """Get ready; may take minutes, and is called on a thread of its own."""

    @abstractmethod
    async def is_serving(self) -> bool:
        """Whether requests are served at once."""

    @property
    @abstractmethod
    def has_failed(self) -> bool:
        """Whether this process will never serve again."""

    @abstractmethod
    async def submit(self, request: ImageRequest, count: int) -> list[Future[GeneratedImage]]:
        """Stand in line for images.

        Raises:
            Refusal: The request cannot be, or not now.
        """

    @abstractmethod
    async def stats(self) -> EngineStats:
        """The counts of all that draws."""

    @abstractmethod
    def retry_after_s(self) -> int:
        """Whole seconds until a refused request may find room."""

    def refusal(self, error: BaseException) -> Refusal:
        """What an image's outcome that is no image means to a client."""
        if isinstance(error, MSDDAError):
            return of_engine(error, self.retry_after_s())
        return Refusal(500, "internal error", code="internal", kind="server_error")

    def objectives(self) -> dict[str, Any]:
        """What a client may choose, and within which limits."""
        settings = self.settings
        data = [
            {"id": name, "eta": o.eta, "guidance_scale": o.guidance_scale}
            for name, o in self._objectives.items()
        ]
        limits = ("max_steps", "max_images", "max_prompt_chars")
        return {
            "object": "list",
            "data": data,
            "model": settings.model,
            "sizes": self.sizes,
            "steps": settings.steps,
            **{name: getattr(settings, name) for name in limits},
        }


class EngineService(Service):
    """Images of an engine in this process.

    Args:
        engine: Draws; its owner closes it.
        settings: Of the service.

    Raises:
        InvalidShape: A size in the settings that the model cannot draw.
        ValueError: A request may have more images than may wait.

    Attributes:
        is_warm: Whether everything has been built and captured.
        failure: Why it never will be; None: it may.
    """

    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        sizes = settings.sizes or ("{}x{}".format(*engine.native_size),)
        super().__init__(settings, sizes=sizes, objectives=engine.pipe.objectives)
        if settings.max_images > engine.queue_limit:
            raise ValueError(
                f"requests may have max_images={settings.max_images}, "
                f"but only queue_limit={engine.queue_limit} may wait"
            )
        self.engine = engine
        config, factor = engine.pipe.unet.config, engine.pipe.vae_scale_factor
        for width, height in map(sides, self.sizes):
            latent_shape(1, config, factor, height, width)
        self.is_warm = False
        self.failure: str | None = None

    def warm(self) -> None:
        """Build and capture all that a request may ask for; takes seconds to minutes."""
        kinds = {padded_steps(steps): steps for steps in range(1, self.settings.max_steps + 1)}
        try:
            for width, height in map(sides, self.sizes):
                for steps in kinds.values():
                    self.engine.prepare(height, width, steps)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            logger.exception("cannot get ready")
        else:
            self.is_warm = True
            logger.info("ready", extra={"fields": {"sizes": self.sizes}})

    @property
    def is_ready(self) -> bool:
        """Whether requests are served at once."""
        return self.is_warm and not self.engine.stats().is_closed

    async def is_serving(self) -> bool:
        """See `Service`."""
        return self.is_ready

    @property
    def has_failed(self) -> bool:
        """See `Service`."""
        return (self.failure or self.engine.stats().failure) is not None

    async def submit(self, request: ImageRequest, count: int) -> list[Future[GeneratedImage]]:
        """See `Service`."""
        if not self.is_warm:
            raise Refusal(
                503, "the model is being prepared", code="not_ready", kind="server_error",
                retry_after_s=5,
            )  # fmt: skip
        try:
            return self.engine.submit_images(request, count)
        except MSDDAError as error:
            raise self.refusal(error) from error

    async def stats(self) -> EngineStats:
        """See `Service`."""
        return self.engine.stats()

    def retry_after_s(self) -> int:
        """When the line will be gone: batches in it, at the mean time of one so far."""
        stats = self.engine.stats()
        drawn = stats.completed / stats.batches if stats.batches else 1.0
        seconds = stats.drawing_s / stats.batches if stats.batches else 1.0
        return min(60, max(1, math.ceil(stats.waiting / max(1.0, drawn) * seconds)))


def lay_out(pipe: MSDDAPipeline) -> MSDDAPipeline:
    """Put convolutions into the layout that captured batches share, in place.

    Else every captured size would hold a copy of them.
    """
    if pipe.device.type == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def encoded(image: Image.Image) -> str:
    """The image as PNG in base 64."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()

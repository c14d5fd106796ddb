# SPDX-License-Identifier: Apache-2.0
"""A replica: one engine, warmed up before it takes requests, that reports progress as it draws."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

from msdda_fast.batching.engine import Engine
from msdda_fast.batching.request import GeneratedImage, ImageRequest, Progress
from msdda_fast.batching.stats import EngineStats
from msdda_fast.errors import EngineFailed, MSDDAError
from msdda_fast.serve.facts import Facts
from msdda_fast.serve.logs import log_to_stderr
from msdda_fast.serve.service import EngineService
from msdda_fast.serve.settings import ServeSettings

__all__ = ["Admitted", "Drawer", "News", "Outcome"]


class Admitted(NamedTuple):
    """The request is valid and in the queue."""


class Outcome(NamedTuple):
    """One image of a request, counted from 0, or the error that it ended with."""

    image: int
    result: GeneratedImage | BaseException


News = Admitted | Progress | Outcome | MSDDAError


class Drawer:
    """An engine in a Ray actor.

    Args:
        load: Returns the pipeline.
        settings: Limits of the service.
        engine: Arguments of `Engine`.

    Raises:
        EngineFailed: The engine cannot be warmed up; the message says why.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        settings: ServeSettings,
        engine: Mapping[str, Any],
    ) -> None:
        log_to_stderr()
        self._engine = Engine(load(), **engine)
        self._service = EngineService(self._engine, settings)
        self._service.warm()
        if self._service.failure is not None:
            self._engine.close(drain=False)
            raise EngineFailed(f"the model cannot be prepared: {self._service.failure}")

    def facts(self) -> Facts:
        """Return what requests are checked against before a replica sees them."""
        return self._service.facts

    def stats(self) -> EngineStats:
        """Return the engine's counts."""
        return self._engine.stats()

    def check_health(self) -> None:
        """Raise if the engine has stopped, so that Ray replaces the replica.

        Raises:
            EngineFailed: The engine has stopped.
        """
        if self._service.has_failed:
            raise EngineFailed(f"the engine has stopped: {self._engine.stats().failure}")

    async def draw(
        self, request: ImageRequest, count: int, watched: bool, client: str
    ) -> AsyncIterator[News]:
        """Draw `count` images, and cancel them when the caller stops listening.

        Args:
            request: What to draw.
            count: Number of images.
            watched: Whether to report every step.
            client: Who asks.

        Yields: The error that the engine refused the request with; or `Admitted`, `Progress` for
            each step if watched, and an `Outcome` for each image.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Progress | Outcome] = asyncio.Queue()

        def tell(item: Progress | Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(news.put_nowait, item)

        def finished(index: int, future: Future[GeneratedImage]) -> None:
            if not future.cancelled():
                tell(Outcome(index, future.exception() or future.result()))

        try:
            futures = self._engine.submit_images(
                replace(request, on_step=tell if watched else None), count, client=client
            )
        except MSDDAError as error:
            yield error
            return
        try:
            for index, future in enumerate(futures):
                future.add_done_callback(lambda done, index=index: finished(index, done))  # type: ignore[misc]
            yield Admitted()
            missing = count
            while missing:
                item = await news.get()
                missing -= isinstance(item, Outcome)
                yield item
        finally:
            for future in futures:
                future.cancel()

    def __del__(self) -> None:
        # Ray calls it once the replica has no requests left; none may have been made
        if engine := getattr(self, "_engine", None):
            engine.close(drain=False)

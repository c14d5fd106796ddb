# SPDX-License-Identifier: Apache-2.0
"""The images of one request, drawn by whichever replica survives to finish them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import cast

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from msdda_fast.batching.request import GeneratedImage, ImageRequest, Progress
from msdda_fast.errors import EngineClosed, EngineFailed, MSDDAError, QueueFull, RequestTimeout
from msdda_fast.serve.ray_drawer import Admitted, Drawer, News

__all__ = ["Order"]

logger = logging.getLogger("msdda_fast.serve")

#: Seconds before a request that lost its replica is sent to another one. There is an end to it:
#: what a request does to one replica it may do to all.
PAUSES_S = (0.1, 1.0, 3.0)


class Order:
    """Sends a request to replicas until one has drawn it.

    The seed is fixed first, so that the images are the same wherever they are drawn; each image is
    returned once.

    Args:
        drawer: Handle of the replicas.
        request: With or without a seed.
        count: Number of images.
        client: Who asks.

    Attributes:
        futures: One per image; their outcomes are those of `Engine.submit_images`.
    """

    def __init__(
        self,
        drawer: DeploymentHandle[Drawer],
        request: ImageRequest,
        count: int,
        client: str,
    ) -> None:
        seed = secrets.randbits(63) if request.seed is None else request.seed
        self._drawer = drawer.options(stream=True)
        self._request = replace(request, seed=seed, on_step=None)
        self._client = client
        self._on_step = request.on_step
        self._expires = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        self._steps = [0] * count
        self._admitted = asyncio.Event()
        self.futures: list[Future[GeneratedImage]] = [Future() for _ in range(count)]
        self._drawing = asyncio.create_task(self._draw())
        for future in self.futures:
            future.add_done_callback(self._left)

    async def admitted(self) -> None:
        """Wait until the images are in a replica's queue.

        Raises:
            MSDDAError: They were refused, as by `Engine.submit_images`, or `RequestTimeout`.
        """
        try:
            await self._admitted.wait()
        except asyncio.CancelledError:
            self._drawing.cancel()
            raise
        first = self.futures[0]
        if first.done() and (error := first.exception()) is not None:
            raise error

    async def _draw(self) -> None:
        try:
            async with asyncio.timeout(self._request.timeout_s):
                await self._draw_somewhere()
        except TimeoutError:
            self._fail(RequestTimeout(f"no image after {self._request.timeout_s:.3g} s"))
        except MSDDAError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("a request failed")
            self._fail(EngineFailed(f"{type(error).__name__}: {error}"))
        finally:
            self._admitted.set()

    async def _draw_somewhere(self) -> None:
        for pause in (*PAUSES_S, None):
            try:
                return await self._draw_once()
            except (RayTaskError, TaskCancelledError):
                raise
            except BackPressureError as error:
                raise QueueFull(str(error)) from error
            except (RayError, EngineClosed, EngineFailed) as error:
                if pause is None:
                    raise
                reason = type(error).__name__
                logger.warning("asking another replica", extra={"fields": {"reason": reason}})
                await asyncio.sleep(pause)

    async def _draw_once(self) -> None:
        request = self._request
        if self._expires is not None:
            request = replace(request, timeout_s=max(1e-3, self._expires - time.monotonic()))
        watched = self._on_step is not None
        asked = self._drawer.draw.remote(request, len(self.futures), watched, self._client)
        news = cast("DeploymentResponseGenerator[News]", asked)
        try:
            async for item in news:
                self._take(item)
        finally:
            news.cancel()  # does nothing to what has ended

    def _take(self, item: News) -> None:
        match item:
            case Admitted():
                self._admitted.set()
            case Progress():
                # a second replica begins anew: what it repeats was told already
                if self._on_step is not None and item.step > self._steps[item.image]:
                    self._steps[item.image] = item.step
                    self._on_step(item)
            case MSDDAError() | (_, EngineClosed() | EngineFailed()):
                raise item if isinstance(item, MSDDAError) else item[1]
            case (index, BaseException() as error):
                self._settle(index, error)
            case (index, GeneratedImage() as image):
                self._settle(index, image)

    def _settle(self, index: int, result: GeneratedImage | BaseException) -> None:
        future = self.futures[index]
        if future.done() or not future.set_running_or_notify_cancel():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _fail(self, error: MSDDAError) -> None:
        for index in range(len(self.futures)):
            self._settle(index, error)

    def _left(self, future: Future[GeneratedImage]) -> None:
        if future.cancelled() and all(future.done() for future in self.futures):
            self._drawing.cancel()

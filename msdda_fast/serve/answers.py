# SPDX-License-Identifier: Apache-2.0
"""Responses with images: all at once, or as events while they are drawn."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fastapi import Request
from PIL import Image

from msdda_fast.batching.request import GeneratedImage, ImageRequest, Progress
from msdda_fast.serve.service import Service, encoded

__all__ = ["ClientGone", "complete", "stream"]

#: Seconds of silence after which a stream says that it is alive, and sees whether its client is.
KEEP_ALIVE_S = 2.0

#: OpenAI's client expects it in the event of a finished image.
NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


class ClientGone(Exception):
    """The client closed the connection; its images were cancelled."""


async def complete(
    service: Service, request: ImageRequest, count: int, connection: Request
) -> list[GeneratedImage]:
    """Wait for all images of a request, until the client disconnects.

    Raises:
        Refusal: One of the images could not be drawn.
        ClientGone: The client has disconnected.
    """
    futures = await service.submit(request, count, connection.state.client)
    images = asyncio.gather(*map(asyncio.wrap_future, futures))
    images.add_done_callback(_looked_at)
    gone = asyncio.create_task(_disconnected(connection))
    try:
        first: set[asyncio.Future[Any]] = {images, gone}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not images.done():
            raise ClientGone
        try:
            return await images
        except Exception as error:
            raise service.refusal(error) from error
    finally:
        gone.cancel()
        images.cancel()
        for future in futures:
            future.cancel()


async def stream(
    service: Service,
    request: ImageRequest,
    count: int,
    *,
    kind: str,
    client: str,
    progress: bool,
    on_end: Callable[[Any], None],
) -> AsyncIterator[str]:
    """Queue the request and return its events: previews and images, in OpenAI's types.

    Args:
        kind: What its events are called: "image_generation" or "image_edit".
        client: Who asks.
        progress: Whether to send an event after every step of every image, too. It is of no type
            that OpenAI's client knows.
        on_end: Called with the results, or with the `Refusal` that ended the stream.

    Raises:
        Refusal: The request is invalid, or cannot be accepted now.
    """
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[Progress | tuple[int, Future[GeneratedImage]]] = asyncio.Queue()

    def tell(item: Progress | tuple[int, Future[GeneratedImage]]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(news.put_nowait, item)

    watched = replace(request, on_step=tell) if progress or request.preview_steps else request
    futures = await service.submit(watched, count, client)
    for index, future in enumerate(futures):
        future.add_done_callback(lambda done, index=index: tell((index, done)))  # type: ignore[misc]
    return _events(service, request, futures, news, kind, progress, on_end)


async def _events(
    service: Service,
    request: ImageRequest,
    futures: Sequence[Future[GeneratedImage]],
    news: asyncio.Queue[Progress | tuple[int, Future[GeneratedImage]]],
    kind: str,
    progress: bool,
    on_end: Callable[[Any], None],
) -> AsyncIterator[str]:
    results: list[GeneratedImage] = []
    try:
        while len(results) < len(futures):
            try:
                item = await asyncio.wait_for(news.get(), KEEP_ALIVE_S)
            except TimeoutError:
                yield ": waiting\n\n"
                continue
            if isinstance(item, Progress):
                where = {"index": item.image, "step": item.step, "steps": item.steps}
                if progress:
                    yield _event(f"{kind}.progress", where)
                if item.preview is not None:
                    partial = request.preview_steps.index(item.step)
                    data = {**where, "partial_image_index": partial, **await _png(item.preview)}
                    yield _event(f"{kind}.partial_image", data)
                continue
            index, future = item
            if (error := future.exception()) is not None:
                refusal = service.refusal(error)
                on_end(refusal)
                yield _event("error", refusal.body)
                return
            results.append(future.result())
            yield _event(f"{kind}.completed", await _completed(results[-1], index))
        on_end(results)
        yield "data: [DONE]\n\n"
    finally:
        for future in futures:
            future.cancel()


async def _completed(result: GeneratedImage, index: int) -> dict[str, Any]:
    return {
        "index": index,
        **await _png(result.image),
        "usage": NO_USAGE,
        "seed": result.seed,
        "batch_size": result.batch_size,
        "waited_s": round(result.waited_s, 4),
        "drawn_s": round(result.drawn_s, 4),
    }


async def _png(image: Image.Image) -> dict[str, Any]:
    """The fields that OpenAI's events have for an image, finished or not."""
    return {
        "b64_json": await asyncio.to_thread(encoded, image),
        "created_at": int(time.time()),
        "size": "{}x{}".format(*image.size),
        "output_format": "png",
        "background": "opaque",
        "quality": "auto",
    }


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def _looked_at(done: asyncio.Future[Any]) -> None:
    """Look at what a future ended with: asyncio logs the errors that nobody has looked at."""
    if not done.cancelled():
        done.exception()


async def _disconnected(connection: Request) -> None:
    while (await connection.receive())["type"] != "http.disconnect":
        pass

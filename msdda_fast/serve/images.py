# SPDX-License-Identifier: Apache-2.0
"""The routes that draw: `POST /v1/images/generations` and `POST /v1/images/edits`."""

# no `from __future__ import annotations`: FastAPI reads the types of routes from their signatures

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from msdda_fast.batching.request import GeneratedImage, ImageRequest
from msdda_fast.serve.answers import ClientGone, complete, stream
from msdda_fast.serve.body import DrawingBody, ErrorBody, GenerationBody, ImagesBody
from msdda_fast.serve.forms import FORM, edit_form
from msdda_fast.serve.refusals import Refusal
from msdda_fast.serve.service import Service, encoded

__all__ = ["add_images"]

#: Forms whose images are decoded at a time: one of 2^24 pixels takes up to 200 MB meanwhile.
DECODED_AT_ONCE = 4

#: What a client may get, for the documentation.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 429, 500, 503, 504)
}
#: Each of the events of a stream; `data` is JSON, or [DONE] at the end.
EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesBody, "content": {"text/event-stream": {"schema": EVENT}}},
    **REFUSALS,
}


def add_images(app: FastAPI, service: Service) -> None:
    """Add the routes."""
    settings = service.settings
    decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    @app.post("/v1/images/generations", responses=ANSWERS)
    async def generate(body: GenerationBody, connection: Request) -> Response:
        """Draw a prompt with the objectives balanced by your weights."""
        if body.masks:
            request = await asyncio.to_thread(body.checked, settings, service.sizes)
        else:
            request = body.checked(settings, service.sizes)
        return await _answer(service, body, request, "image_generation", connection)

    @app.post("/v1/images/edits", responses=ANSWERS, openapi_extra={"requestBody": FORM})
    async def edit(connection: Request) -> Response:
        """Draw from an image, all of it or where a mask is transparent; OpenAI's form."""
        try:
            async with edit_form(connection, settings) as form, decoding:
                request = await asyncio.to_thread(form.checked, settings, service.sizes)
        except ClientDisconnect:
            raise ClientGone from None
        return await _answer(service, form.body, request, "image_edit", connection)


async def _answer(
    service: Service, body: DrawingBody, request: ImageRequest, kind: str, connection: Request
) -> Response:
    start, log = time.monotonic(), connection.state.log
    size = f"{request.width}x{request.height}"
    log |= {"n": body.count, "size": size, "steps": request.num_inference_steps}
    if service.settings.log_prompts:
        log |= {"prompt": body.prompt, "negative_prompt": body.negative_prompt}

    def ended(outcome: Sequence[GeneratedImage] | Refusal) -> None:
        if isinstance(outcome, Refusal):
            log["error"] = outcome.code
            service.metrics.refusals.labels(outcome.code).inc()
            return
        service.metrics.latency.observe(time.monotonic() - start)
        log["batch_sizes"] = [result.batch_size for result in outcome]
        log["waited_s"] = round(max(result.waited_s for result in outcome), 4)

    if body.stream:
        events = await stream(
            service,
            request,
            body.count,
            kind=kind,
            client=connection.state.client,
            progress=bool(body.progress),
            on_end=ended,
        )
        return StreamingResponse(events, media_type="text/event-stream")
    results = await complete(service, request, body.count, connection)
    data = [
        {"b64_json": await asyncio.to_thread(encoded, result.image), "seed": result.seed}
        for result in results
    ]
    ended(results)
    return JSONResponse(
        {
            "created": int(time.time()),
            "data": data,
            "output_format": "png",
            "background": "opaque",
            "size": size,
        }
    )

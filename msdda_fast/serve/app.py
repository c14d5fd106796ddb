# SPDX-License-Identifier: Apache-2.0
"""The routes. `create_app(engine, settings)` is a FastAPI app for any ASGI server.

`app_of(service)` is the same app for images that are drawn elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from msdda_fast.batching.engine import Engine
from msdda_fast.serve.answers import ClientGone
from msdda_fast.serve.body import ErrorBody
from msdda_fast.serve.docs_page import add_docs
from msdda_fast.serve.guard import Guard
from msdda_fast.serve.images import add_images
from msdda_fast.serve.models import add_models
from msdda_fast.serve.refusals import Refusal, of_http, of_validation
from msdda_fast.serve.service import EngineService, Service
from msdda_fast.serve.settings import ServeSettings
from msdda_fast.serve.web_page import add_page

__all__ = ["app_of", "create_app"]


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """Return an app that serves `engine`; the caller closes the engine after the server stops.

    The app warms the engine up when it starts, and is ready afterwards. `app.state.service` is its
    `Service`.

    Args:
        engine: An engine with `output_type="pil"`.
        settings: Limits of the service.

    Raises:
        InvalidShape: The model cannot draw one of the sizes in the settings.
    """
    return app_of(EngineService(engine, settings))


def app_of(service: Service) -> FastAPI:
    """Return an app for a service, which is warmed up when the app starts."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(asyncio.to_thread(service.warm))
        yield
        warming.cancel()

    app = FastAPI(
        title=f"msdda-fast: {settings.model}",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own need scripts of another site
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    _refuse_as_openai(app, service)
    add_page(app)
    add_docs(app)
    add_models(app, settings.model)
    add_images(app, service)

    @app.get("/v1/objectives", responses={401: {"model": ErrorBody}})
    async def objectives() -> dict[str, Any]:
        """List the objectives that `weights` may name, the sizes, and the limits."""
        return service.objectives()

    @app.get("/health", responses={503: {"model": ErrorBody}})
    async def health() -> dict[str, str]:
        """Say whether this process works, or is restarting its engine; on 503, replace it."""
        if service.has_failed:
            raise Refusal(503, "the engine failed", code="failed", kind="server_error")
        return {"status": "restarting" if service.is_restarting else "ok"}

    @app.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> dict[str, str]:
        """Say whether requests are accepted now."""
        if not await service.is_serving():
            raise Refusal(503, "not ready", code="not_ready", kind="server_error", retry_after_s=5)
        return {"status": "ready"}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: {"model": ErrorBody}},
    )
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(
            service.metrics.text(await service.stats()), media_type="text/plain; version=0.0.4"
        )

    return app


def _refuse_as_openai(app: FastAPI, service: Service) -> None:
    """Answer every error in OpenAI's format, and count it."""

    def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        request.state.log["error"] = refusal.code
        service.metrics.refusals.labels(refusal.code).inc()
        return refusal.response()

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refuse(request, of_validation(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return refuse(request, of_http(error))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        request.state.log["error"] = "client_gone"
        return Response(status_code=499)  # nobody reads it

# SPDX-License-Identifier: Apache-2.0
"""`/v1/models`, from which OpenAI's clients learn the name of the one model served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI

from msdda_fast.serve.body import ErrorBody
from msdda_fast.serve.refusals import Refusal

__all__ = ["add_models"]


def add_models(app: FastAPI, name: str) -> None:
    """Add the routes that list the model and describe it."""
    model = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "msdda-fast",
    }

    @app.get("/v1/models", responses={401: {"model": ErrorBody}})
    async def models() -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [model]}

    @app.get(
        "/v1/models/{name:path}",
        responses={401: {"model": ErrorBody}, 404: {"model": ErrorBody}},
    )
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the served model."""
        if name != model["id"]:
            raise Refusal.of_model(str(model["id"]))
        return model

# SPDX-License-Identifier: Apache-2.0
"""Every refusal as OpenAI's JSON: `{"error": {"type", "message", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from msdda_fast.errors import EngineClosed, EngineFailed, MSDDAError, QueueFull, RequestTimeout

__all__ = ["CHOICES", "Refusal", "of_engine", "of_http", "of_validation"]

#: Most characters of a message, and of the name of a field: either may repeat what a client sent.
MOST_MESSAGE, MOST_PARAM = 200, 64

#: Where a field has forms, each has a name for the validation that clients do not see.
CHOICES = ("<plain>", "<by range>")

#: The names that an `ImageRequest` has for what a body calls otherwise.
_PARAMS = {
    "num_inference_steps": "steps",
    "height": "size",
    "width": "size",
    "mask_image": "mask",
    "on_step": "progress",
    "preview_steps": "partial_images",
}


class Refusal(Exception):
    """An error response in place of an image.

    Args:
        status: HTTP status.
        message: Explanation for people.
        param: The invalid field of the body, if the error is about one.
        code: Identifier for programs, such as "queue_full".
        kind: OpenAI's `type`.
        retry_after_s: Whole seconds until the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.kind, self.retry_after_s = code, kind, retry_after_s

    @classmethod
    def of_field(cls, param: str, message: str) -> Refusal:
        """Return the refusal of an invalid field, with status 400."""
        return cls(400, message, param=param, code="invalid_value")

    @classmethod
    def stopping(cls, retry_after_s: int) -> Refusal:
        """Return the refusal of a service that shuts down, with status 503."""
        return cls(
            503, "the service is shutting down", code="unavailable", kind="server_error",
            retry_after_s=retry_after_s,
        )  # fmt: skip

    @classmethod
    def of_model(cls, served: str) -> Refusal:
        """Return the refusal of another model than the one served, with status 404."""
        return cls(
            404, f"the model served here is {served!r}", param="model", code="model_not_found"
        )

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body; what is from the client is short, and valid Unicode."""
        error = {
            "type": self.kind,
            "message": _short(self.message, MOST_MESSAGE),
            "param": None if self.param is None else _short(self.param, MOST_PARAM),
            "code": self.code,
        }
        return {"error": error}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return the HTTP response, with `headers` added."""
        more = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body, self.status, headers={**(headers or {}), **more})


def of_engine(error: MSDDAError, retry_after_s: int) -> Refusal:
    """Translate an error of the engine for the client."""
    match error:
        case QueueFull():
            return Refusal(
                429, str(error), code="queue_full", kind="rate_limit_error",
                retry_after_s=retry_after_s,
            )  # fmt: skip
        case RequestTimeout():
            return Refusal(504, str(error), code="timeout", kind="server_error")
        case EngineClosed():
            return Refusal.stopping(retry_after_s)
        case EngineFailed():
            return Refusal(500, "the image could not be drawn", code="failed", kind="server_error")
        case _ if error.field is not None:
            return Refusal.of_field(_PARAMS.get(error.field, error.field), str(error))
        case _:
            return Refusal(500, "internal error", code="internal", kind="server_error")


def of_validation(error: RequestValidationError) -> Refusal:
    """Return the refusal for the first error in a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(400, "the body is not valid JSON", code="invalid_json")
    path = [str(part) for part in first["loc"] if part not in ("body", *CHOICES)]
    if not path:
        message = f"the body must be a JSON object with valid names: {first['msg']}"
        return Refusal(400, message, code="invalid_value")
    return Refusal.of_field(".".join(path), first["msg"].removeprefix("Value error, "))


def of_http(error: HTTPException) -> Refusal:
    """Translate what the framework itself refuses: unknown paths, methods, unreadable bodies."""
    codes = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    code = codes.get(error.status_code, "invalid_request")
    return Refusal(error.status_code, str(error.detail), code=code)


def _short(text: str, most: int) -> str:
    """Cut the middle out of a long text: the end often says what would have been right."""
    if len(text) > most:
        half = (most - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text.encode("utf-8", "replace").decode()

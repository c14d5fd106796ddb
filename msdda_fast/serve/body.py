# SPDX-License-Identifier: Apache-2.0
"""The body of `POST /v1/images/generations`: OpenAI's fields and ours, and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from msdda_fast.batching.request import ImageRequest
from msdda_fast.serve.refusals import Refusal
from msdda_fast.serve.settings import ServeSettings, sides

__all__ = ["ErrorBody", "GenerationBody", "ImagesBody"]

#: Models are asked for less than 20; 1e30 leaves the range of float32, and gives no image at all.
MOST_GUIDANCE = 100

Number = Annotated[float, Field(allow_inf_nan=False)]


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    type: str
    message: str
    param: str | None = Field(description="The invalid field, if the error is about one.")
    code: str


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class DrawnImage(BaseModel):
    """A PNG in base64, and the seed that reproduces it."""

    b64_json: str
    seed: int


class ImagesBody(BaseModel):
    """All images of a request, in the order of their seeds."""

    created: int = Field(description="Unix time in seconds.")
    data: list[DrawnImage]
    output_format: Literal["png"]
    size: str = Field(description='"WIDTHxHEIGHT" in pixels.')


class GenerationBody(BaseModel):
    """OpenAI's fields, and those of this service: weights, seed, steps, guidance_scale,
    negative_prompt. `GET /v1/objectives` lists the limits; unknown fields are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="The served model, if given.")
    n: int = Field(1, ge=1, description="Number of images; they use consecutive seeds.")
    size: str | None = Field(
        None, description='One of the served sizes, "WIDTHxHEIGHT" in pixels, or "auto".'
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="Images are part of the response; none are stored, so there are no URLs."
    )
    output_format: Literal["png"] | None = None
    stream: bool | None = Field(None, description="Server-sent events: progress, then images.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Previews of each streamed image; fewer with very few steps."
    )
    user: str | None = Field(None, max_length=256, description="Accepted but ignored.")
    weights: dict[str, Number] | None = Field(
        None, description="A weight for every objective, summing to 1; uniform by default."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the first image; random by default."
    )
    steps: int | None = Field(None, ge=1, description="Denoising steps T.")
    guidance_scale: Number | None = Field(
        None, ge=1, le=MOST_GUIDANCE, description="Guidance scale; 1 means no guidance."
    )
    negative_prompt: str | None = Field(None, description="What guidance should steer away from.")

    def checked(self, settings: ServeSettings, sizes: Sequence[str]) -> ImageRequest:
        """Return the request, checked against the limits of the service.

        Args:
            settings: The limits.
            sizes: The served sizes, "WIDTHxHEIGHT", the default first.

        Raises:
            Refusal: A field exceeds a limit; the refusal names the field.
        """
        if self.model is not None and self.model != settings.model:
            raise Refusal(
                404, f"the model served here is {settings.model!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        if self.n > settings.max_images:
            raise Refusal.of_field("n", f"at most {settings.max_images} images per request")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name) or "") > settings.max_prompt_chars:
                raise Refusal.of_field(name, f"at most {settings.max_prompt_chars} characters")
        if self.steps is not None and self.steps > settings.max_steps:
            raise Refusal.of_field("steps", f"at most {settings.max_steps} steps")
        if self.partial_images and not self.stream:
            raise Refusal.of_field("partial_images", "previews are sent only with stream=true")
        steps = settings.steps if self.steps is None else self.steps
        width, height = _sides(self.size, sizes)
        return ImageRequest(
            self.prompt,
            weights=self.weights,
            seed=self.seed,
            num_inference_steps=steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt or "",
            height=height,
            width=width,
            timeout_s=settings.timeout_s,
            preview_steps=_preview_steps(self.partial_images or 0, steps),
        )


def _preview_steps(count: int, steps: int) -> list[int]:
    """Steps spread evenly over the second half, where an image becomes visible in the noise."""
    chosen = {steps // 2 + (i + 1) * steps // (2 * count + 2) for i in range(count)}
    return sorted(chosen & set(range(1, steps)))


def _sides(size: str | None, sizes: Sequence[str]) -> tuple[int, int]:
    if size in (None, "auto"):
        size = sizes[0]
    if size not in sizes:
        raise Refusal.of_field("size", f"must be one of {', '.join(sizes)}, or auto")
    return sides(size)

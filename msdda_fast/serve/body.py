# SPDX-License-Identifier: Apache-2.0
"""The body of `POST /v1/images/generations`, OpenAI's and ours, checked."""

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
    param: str | None = Field(description="The field that is wrong, if one is.")
    code: str


class ErrorBody(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetail


class DrawnImage(BaseModel):
    """A PNG in base 64, and the seed that draws it again."""

    b64_json: str
    seed: int


class ImagesBody(BaseModel):
    """All images of a request, in the order of their seeds."""

    created: int = Field(description="Seconds since 1970.")
    data: list[DrawnImage]
    output_format: Literal["png"]
    size: str = Field(description='"WIDTHxHEIGHT" in pixels.')


class GenerationBody(BaseModel):
    """OpenAI's fields, and those of this model: weights, seed, steps, guidance_scale,
    negative_prompt. Limits of the service are in `GET /v1/objectives`; unknown fields are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="The served model, if given.")
    n: int = Field(1, ge=1, description="Images; their seeds count up.")
    size: str | None = Field(None, description='"WIDTHxHEIGHT" of those served, or "auto".')
    response_format: Literal["b64_json"] | None = Field(
        None, description="Images come in the answer; nothing is stored, so there is no url."
    )
    output_format: Literal["png"] | None = None
    stream: bool | None = Field(None, description="Server-sent events: progress, then images.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Previews of each streamed image; fewer if it has few steps."
    )
    user: str | None = Field(None, max_length=256, description="Taken for compatibility, unused.")
    weights: dict[str, Number] | None = Field(
        None, description="By objective, all of them, sum 1; uniform if not given."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of the first image.")
    steps: int | None = Field(None, ge=1, description="Denoising steps T.")
    guidance_scale: Number | None = Field(
        None, ge=1, le=MOST_GUIDANCE, description="1 is no guidance."
    )
    negative_prompt: str | None = Field(None, description="What guidance leads away from.")

    def checked(self, settings: ServeSettings, sizes: Sequence[str]) -> ImageRequest:
        """Return the request, within the limits of the service.

        Args:
            sizes: "WIDTHxHEIGHT" of those served, the default first.

        Raises:
            Refusal: A field is outside them; names it.
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
            raise Refusal.of_field("partial_images", "there are previews only with stream=true")
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
    """Evenly in the second half, where the noise begins to let an image through."""
    chosen = {steps // 2 + (i + 1) * steps // (2 * count + 2) for i in range(count)}
    return sorted(chosen & set(range(1, steps)))


def _sides(size: str | None, sizes: Sequence[str]) -> tuple[int, int]:
    if size in (None, "auto"):
        size = sizes[0]
    if size not in sizes:
        raise Refusal.of_field("size", f"the sizes served are {', '.join(sizes)}, and auto")
    return sides(size)

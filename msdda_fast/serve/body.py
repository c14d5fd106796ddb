# SPDX-License-Identifier: Apache-2.0
"""The fields that clients send, OpenAI's and ours, and their validation."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from msdda_fast.batching.request import ImageRequest
from msdda_fast.serve.refusals import CHOICES, Refusal
from msdda_fast.serve.settings import ServeSettings, sides
from msdda_fast.serve.uploads import objective_masks

if TYPE_CHECKING:
    from msdda_fast.types import WeightSchedule

__all__ = ["DrawingBody", "EditBody", "ErrorBody", "GenerationBody", "ImagesBody"]

#: Models are asked for less than 20; 1e30 leaves the range of float32, and gives no image at all.
MOST_GUIDANCE = 100

#: Random seeds stay below: larger integers are rounded by clients that read JSON into doubles.
EXACT = 2**53

#: OpenAI's fields for what is not drawn here. Its client may send them as null.
NOT_HERE = frozenset(("complexity", "frame_count", "frame_duration_ms", "style", "svg"))

#: Masks that are decoded before objectives are known by name.
MOST_MASKS = 32

#: More would blur a mask over any image that is served.
MOST_SOFTNESS = 1024

Number = Annotated[float, Field(allow_inf_nan=False)]
#: More than this many times as far from the base as an adapter goes leaves nothing of an image.
Strength = Annotated[float, Field(allow_inf_nan=False, ge=0, le=10)]


def _by_range(weights: Any) -> str:  # noqa: ANN401 - whatever JSON it is
    has_mappings = isinstance(weights, dict) and any(isinstance(w, dict) for w in weights.values())
    return CHOICES[1] if has_mappings else CHOICES[0]


#: Weights by objective, or such weights by the range of timesteps that they are for.
Weights: TypeAlias = Annotated[
    Annotated[dict[str, Number], Tag(CHOICES[0])]
    | Annotated[dict[str, dict[str, Number]], Tag(CHOICES[1])],
    Discriminator(_by_range),
]


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
    background: Literal["opaque"]
    size: str = Field(description='"WIDTHxHEIGHT" in pixels.')


class DrawingBody(BaseModel):
    """The fields of every request for images."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(None, description="The served model, if given.")
    n: int | None = Field(1, ge=1, description="Number of images; they use consecutive seeds.")
    size: str | None = Field(
        None, description='One of the served sizes, "WIDTHxHEIGHT" in pixels, or "auto".'
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json: no image is stored, so there are no URLs and url is refused."
    )
    output_format: Literal["png"] | None = None
    output_compression: Literal[100] | None = Field(None, description="PNG loses nothing.")
    quality: Literal["auto"] | None = Field(None, description="`steps` decides it.")
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = Field(None, description="What the operator decides.")
    stream: bool | None = Field(None, description="Server-sent events: previews, then images.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="Previews of each streamed image; fewer with very few steps."
    )
    progress: bool | None = Field(None, description="Also stream an event after every step.")
    user: str | None = Field(None, max_length=256, description="Accepted but ignored.")
    safety_identifier: str | None = Field(None, max_length=256, description="Accepted but ignored.")
    weights: Weights | None = Field(
        None,
        description="A weight for every objective, summing to 1; uniform by default. Or such "
        'weights by range of timesteps, both ends included: {"500-999": {...}, "0-499": {...}}.',
    )
    masks: dict[str, str] | None = Field(
        None,
        max_length=MOST_MASKS,
        description="Where an objective acts: a PNG of the drawn size in base64, white where its "
        "weight is 1. Objectives without a mask share the rest.",
    )
    mask_softness: Number | None = Field(
        None, ge=0, le=MOST_SOFTNESS, description="Standard deviation that blurs masks, in pixels."
    )
    strength: Strength | dict[str, Strength] | None = Field(
        None, description="How strongly objectives act, at once or by name: 1 as trained, 0 not."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Seed of the first image; random by default."
    )
    steps: int | None = Field(None, ge=1, description="Denoising steps T.")
    guidance_scale: Number | None = Field(
        None,
        ge=0,
        le=MOST_GUIDANCE,
        description="Guidance scale; 1 means no guidance, and less only some models take.",
    )
    negative_prompt: str | None = Field(None, description="What guidance should steer away from.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:  # noqa: ANN401 - whatever JSON it is
        if not isinstance(body, dict):
            return body
        return {k: v for k, v in body.items() if v is not None or k not in NOT_HERE}

    @property
    def count(self) -> int:
        """Number of images."""
        return 1 if self.n is None else self.n

    def checked(
        self, settings: ServeSettings, sizes: Sequence[str], own_size: str | None = None
    ) -> ImageRequest:
        """Return the request, checked against the limits of the service. Decodes masks.

        Args:
            settings: The limits.
            sizes: The served sizes, "WIDTHxHEIGHT", the default first.
            own_size: The size of an image to start from, which is drawn by default if it is served.

        Raises:
            Refusal: A field exceeds a limit; the refusal names the field.
        """
        if self.model is not None and self.model != settings.model:
            raise Refusal.of_model(settings.model)
        if self.response_format == "url":
            raise Refusal.of_field(
                "response_format", "no image is stored, so there are no URLs; ask for b64_json"
            )
        if self.count > settings.max_images:
            raise Refusal.of_field("n", f"at most {settings.max_images} images per request")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(self, name) or "") > settings.max_prompt_chars:
                raise Refusal.of_field(name, f"at most {settings.max_prompt_chars} characters")
        if self.steps is not None and self.steps > settings.max_steps:
            raise Refusal.of_field("steps", f"at most {settings.max_steps} steps")
        for name in ("partial_images", "progress"):
            if getattr(self, name) and not self.stream:
                raise Refusal.of_field(name, "these events are sent only with stream=true")
        steps = settings.steps if self.steps is None else self.steps
        size = _size(self.size, sizes, own_size)
        if (cost := settings.cost(self.count, steps, size, sizes[0])) > settings.max_cost:
            raise Refusal.of_field(
                "n", f"{self.count} images of {size} with {steps} steps cost {cost:g}, more than "
                f"{settings.max_cost:g}: ask for fewer images, fewer steps or a smaller size",
            )  # fmt: skip
        width, height = sides(size)
        return ImageRequest(
            self.prompt,
            weights=cast("WeightSchedule", self.weights),
            strength=self.strength,
            seed=_seed(self.seed, self.count),
            num_inference_steps=steps,
            guidance_scale=(
                settings.guidance_scale if self.guidance_scale is None else self.guidance_scale
            ),
            negative_prompt=self.negative_prompt or "",
            height=height,
            width=width,
            timeout_s=settings.timeout_s,
            preview_steps=_preview_steps(self.partial_images or 0, steps),
            masks=objective_masks(self.masks, (width, height)) if self.masks else None,
            mask_softness=self.mask_softness,
        )


class GenerationBody(DrawingBody):
    """OpenAI's fields, and those of this service: weights, masks, mask_softness, strength, seed,
    steps, guidance_scale, negative_prompt, progress. `GET /v1/objectives` lists the limits and what
    the model can do; unknown fields are refused.
    """


class EditBody(DrawingBody):
    """The fields of a form beside its files: those of `POST /v1/images/generations`, and
    image_strength. Objects are JSON, or have a field for each entry, as weights[NAME].
    """

    image_strength: Number | None = Field(
        None,
        gt=0,
        le=1,
        description="How much of the image is drawn anew: 1 keeps next to nothing of it.",
    )

    def checked(
        self, settings: ServeSettings, sizes: Sequence[str], own_size: str | None = None
    ) -> ImageRequest:
        """As `DrawingBody.checked`."""
        request = super().checked(settings, sizes, own_size)
        return replace(request, image_strength=self.image_strength)


def _preview_steps(count: int, steps: int) -> list[int]:
    """Steps spread evenly over the second half, where an image becomes visible in the noise."""
    chosen = {steps // 2 + (i + 1) * steps // (2 * count + 2) for i in range(count)}
    return sorted(chosen & set(range(1, steps)))


def _size(size: str | None, sizes: Sequence[str], own: str | None) -> str:
    if size is None or size == "auto":
        return own if own is not None and own in sizes else sizes[0]
    if size not in sizes:
        raise Refusal.of_field("size", f"must be one of {', '.join(sizes)}, or auto")
    return size


def _seed(seed: int | None, count: int) -> int:
    """Return the first of `count` seeds, each of which a client can send back."""
    if seed is None:
        return secrets.randbelow(EXACT - count)
    if seed + count > 2**63:
        raise Refusal.of_field("seed", f"the last of {count} seeds would exceed 2^63 - 1")
    return seed

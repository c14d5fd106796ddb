# SPDX-License-Identifier: Apache-2.0
"""What callers hand to an engine, and what they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from msdda_fast.types import WeightSchedule

__all__ = ["GeneratedImage", "ImageRequest", "Progress"]


class Progress(NamedTuple):
    """Step `step` = 1..`steps` of image `image` = 0.. of a request is done.

    `preview` is the image as it is then, of the kind of the final one, after the steps that the
    request names: the noisy state x_t, decoded. None after others.
    """

    image: int
    step: int
    steps: int
    preview: Any = None


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One prompt with its own preferences; the engine checks it against its model on submission.

    Args:
        prompt: What to draw; not longer than the text encoder reads.
        weights: Preferences w on the simplex, no unit: a mapping from every objective's name to a
            number, (M,) numbers, or a callable from the step index to either. None: uniform.
        seed: Of the first image, in [-2^63, 2^64); the next ones count up. None: a random one.
        num_inference_steps: T.
        guidance_scale: >= 1, for all objectives, by name, or (M,). None: the objective's own.
        negative_prompt: What guidance leads away from.
        height, width: In pixels; None: the model's own.
        timeout_s: > 0, seconds from submission until the request is given up; None: never.
        on_step: Called on the engine's thread after each step; it must be quick. What it raises
            becomes the outcome of this request, and of no other.
        preview_steps: After which of the steps 1..T `on_step` gets a preview. They change no bit of
            any image, and cost time of all who share the batch.
    """

    prompt: str
    _: KW_ONLY
    weights: WeightSchedule = None
    seed: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float | Mapping[str, float] | Sequence[float] | None = None
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    timeout_s: float | None = None
    on_step: Callable[[Progress], object] | None = None
    preview_steps: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage:
    """An image and how it came about.

    Attributes:
        image: A PIL image; with another `output_type` of the engine its array or tensor, without a
            batch axis.
        seed: Draws the same image again.
        is_flagged: Whether the safety checker blackened it.
        batch_size: How many images, of all callers, were drawn together.
        waited_s: From submission until the batch began.
        drawn_s: From then until the image was there.
    """

    image: Any
    seed: int
    is_flagged: bool
    batch_size: int
    waited_s: float
    drawn_s: float

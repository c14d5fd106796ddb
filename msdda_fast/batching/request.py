# SPDX-License-Identifier: Apache-2.0
"""What callers submit to an engine, and what they get back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from msdda_fast.types import WeightSchedule

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["GeneratedImage", "ImageRequest", "Progress"]


class Progress(NamedTuple):
    """Step `step` = 1..`steps` of image `image` = 0.. of a request is done.

    `preview` is the noisy state x_t, decoded to the same type as the final image, after the steps
    in the request's `preview_steps`; None after other steps.
    """

    image: int
    step: int
    steps: int
    preview: Any = None


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One prompt with its own preferences; the engine checks it against its model on submission.

    What a family of models cannot follow is refused with the name of the field.

    Args:
        prompt: What to draw; not longer than the text encoder reads.
        weights: Preferences w on the simplex, no unit: a mapping from every objective's name to a
            number, (M,) numbers, or a callable from the step index to either. None: uniform.
        strength: s >= 0, how strongly objectives act: 1 as trained, 0 the base; a number, by name,
            or (M,). None: 1.
        seed: Seed of the first image, in [-2^63, 2^64); further images count up. None: random.
        num_inference_steps: T.
        guidance_scale: >= 1, for all objectives, by name, or (M,). None: the objective's own. Other
            pipelines than Stable Diffusion 1 and 2 take one number >= 0, and None is their default.
        negative_prompt: What guidance steers away from.
        height, width: In pixels; None: the model's own, or those of `image`, which is resized if
            others are given.
        image: What to start from, for pipelines of diffusers that do.
        mask_image: What to repaint of `image`: white all of it, black nothing; of its size.
        image_strength: In (0, 1], how much of the noise `image` is given, and so of the steps is
            done: diffusers' `strength` of image to image. None: the pipeline's default.
        masks: Where objectives act: a mapping from names to their weights at each pixel, in [0, 1];
            as in the call of pipelines.
        mask_softness: >= 0, standard deviation of the blur of `masks` in pixels; as in the call.
        timeout_s: > 0, seconds from submission until the request expires; None: never.
        on_step: Called on the engine's thread after each step; it must be quick. An exception it
            raises becomes the outcome of this request only.
        preview_steps: Steps in 1..T after which `on_step` gets a preview. Previews change no bit of
            any image, but slow down the whole batch.
    """

    prompt: str
    _: KW_ONLY
    weights: WeightSchedule = None
    strength: float | Mapping[str, float] | Sequence[float] | None = None
    seed: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float | Mapping[str, float] | Sequence[float] | None = None
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    image: Image.Image | None = None
    mask_image: Image.Image | None = None
    image_strength: float | None = None
    masks: Mapping[str, Any] | None = None
    mask_softness: float | None = None
    timeout_s: float | None = None
    on_step: Callable[[Progress], object] | None = None
    preview_steps: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedImage:
    """An image and how it was made.

    Attributes:
        image: A PIL image, or an array or tensor if the engine has another `output_type`; without a
            batch axis. Of a pipeline that makes videos, a list of its frames.
        seed: The seed that reproduces the image.
        is_flagged: Whether the safety checker blackened it.
        batch_size: How many images, over all callers, were drawn together.
        waited_s: Seconds from submission until the batch began.
        drawn_s: Seconds from then until the image was done.
    """

    image: Any
    seed: int
    is_flagged: bool
    batch_size: int
    waited_s: float
    drawn_s: float

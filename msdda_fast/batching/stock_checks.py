# SPDX-License-Identifier: Apache-2.0
"""Checks requests against a stock pipeline with objectives."""

from __future__ import annotations

import itertools
import math
from typing import Any

from PIL import Image
from torch import Tensor

from msdda_fast.batching.checks import check_cost, check_pixels, field
from msdda_fast.batching.limits import Limits, integer
from msdda_fast.batching.request import ImageRequest
from msdda_fast.batching.ticket import RequestTask, Shape, StockImage
from msdda_fast.errors import InvalidRequest, InvalidSchedule, InvalidShape, UnsupportedNetwork
from msdda_fast.pipelines.attach import WithObjectives
from msdda_fast.pipelines.batch import Batch
from msdda_fast.pipelines.call_check import check_fusing, timed
from msdda_fast.pipelines.call_preferences import CallPreferences
from msdda_fast.pipelines.capabilities import Capabilities, check_stock_inputs
from msdda_fast.pipelines.prompt_length import Readers
from msdda_fast.pipelines.regions import Regions, check_masks, check_softness
from msdda_fast.types import ZeroVariancePolicy
from msdda_fast.weight_ranges import has_ranges
from msdda_fast.weights import preference_weights

__all__ = ["StockChecks"]

#: Arguments of stock calls that messages name, and the fields that they are.
_FIELDS = {
    "height": "height",
    "width": "width",
    "mask_image": "mask_image",
    "image": "image",
    "strength": "image_strength",
    "prompt": "prompt",
}


class StockChecks:
    """Checks requests for one pipeline and one task; see `Checks`.

    Args:
        pipe: The pipeline whose call requests are checked against.
        task: What it is called for.
        limits: Bounds of one request.
        guidance: Scale of requests that give none; None: the default of the call.

    Raises:
        UnsupportedNetwork: See `Capabilities.of`.
    """

    def __init__(
        self,
        pipe: WithObjectives,
        task: RequestTask,
        limits: Limits,
        guidance: float | None = None,
    ) -> None:
        self._pipe, self._task, self._limits, self._guidance = pipe, task, limits, guidance
        self.takes = Capabilities.of(pipe)
        self._readers = Readers.of(pipe)
        self._alone = itertools.count()

    def check_text(self, text: Any) -> None:  # noqa: ANN401 - it is what is checked
        """Raise `InvalidRequest` if no text encoder reads a prompt to its end."""
        self._readers.check(text)

    def native_size(self) -> tuple[int, int]:
        """Default width and height, in pixels."""
        return self.takes.width, self.takes.height

    def of(
        self, request: ImageRequest, count: int, zero_variance: ZeroVariancePolicy
    ) -> tuple[Shape, dict[str, Any]]:
        """Return the shape of a request, and what it brings to the call; see `Checks`."""
        takes = self.takes
        self._check_watching(request)
        height, width, image, mask = self._size(request)
        with field("num_inference_steps"):
            steps = integer("num_inference_steps", request.num_inference_steps)
            if steps < 1:
                raise InvalidSchedule(f"num_inference_steps must be at least 1, got {steps}")
            check_cost(self._limits, count, height, width, steps, takes.frames)
            timed(self._pipe.scheduler, steps)  # type: ignore[attr-defined]
        self._check_arguments(request)
        shared = {
            **self._guidance_scale(request),
            **self._image_strength(request, steps),
            **({} if request.mask_softness is None else {"mask_softness": request.mask_softness}),
        }
        prefers = self._preferences(request, steps, self._regions(request, height, width))
        with field("strength"):
            strength = prefers.strength(request.strength, None, 1)
        with field("weights"):
            levels = check_fusing(self._pipe, prefers, steps, zero_variance)
            weights = _sent(request, prefers)
        size = {"height": height, "width": width} if takes.takes_size else {}
        images = {"image": image, "mask_image": mask}
        given = {name: value for name, value in images.items() if value is not None}
        self._let_stock_check(
            prompt=request.prompt, num_inference_steps=steps, **size, **shared, **given
        )
        shape = Shape(
            height,
            width,
            steps,
            with_base=strength is not None,
            task=self._task,
            call=tuple(shared.items()),
            has_negative=bool(request.negative_prompt),
            levels=levels,
            by_range=not isinstance(weights, Tensor),
            alone=next(self._alone) if image is not None and takes.mixes_images else None,
        )
        stock = StockImage(
            weights=weights, strength=strength, image=image, mask_image=mask, masks=request.masks
        )
        return shape, {"stock": stock}

    def plain(
        self, num_inference_steps: int, height: int | None = None, width: int | None = None
    ) -> list[ImageRequest]:
        """Return one request, of an image without content if it takes one; see `Checks`."""
        size = width or self.takes.width, height or self.takes.height
        image = None if self._task == "text" else Image.new("RGB", size)
        return [
            ImageRequest(
                "",
                seed=0,
                num_inference_steps=num_inference_steps,
                height=height,
                width=width,
                image=image,
                mask_image=Image.new("L", size, 255) if self._task == "inpaint" else None,
                image_strength=1.0 if self.takes.call.argument("image_strength") else None,
            )
        ]

    def _let_stock_check(self, **given: Any) -> None:  # noqa: ANN401 - arguments of the call
        """Refuse what the stock call will refuse, by the field that its message names first."""
        try:
            check_stock_inputs(self._pipe, given)
        except ValueError as error:
            text = str(error)
            named = [name for name in _FIELDS if name in text]
            with field(_FIELDS[min(named, key=text.index)] if named else "prompt"):
                raise InvalidRequest(f"{self.takes.call.kind}: {text}") from error

    def _check_watching(self, request: ImageRequest) -> None:
        with field("preview_steps"):
            if request.preview_steps:
                raise InvalidRequest(
                    "previews are of Stable Diffusion 1 and 2 from a text alone: states of other "
                    "pipelines have no common form"
                )
        with field("on_step"):
            if request.on_step is not None and not self.takes.watches:
                raise InvalidRequest(f"{self.takes.call.kind} does not call back after its steps")

    def _size(
        self, request: ImageRequest
    ) -> tuple[int, int, Image.Image | None, Image.Image | None]:
        """Return height and width in pixels, and image and mask in that size."""
        takes, image, mask = self.takes, request.image, request.mask_image
        sides = {}
        for place, name in enumerate(("width", "height")):
            given = getattr(request, name)
            field_name = name
            if image is not None and given is None:
                field_name, given = "image", image.size[place]
            with field(field_name):
                sides[name] = takes.side(name, given)
                if image is None and not takes.takes_size and sides[name] != getattr(takes, name):
                    raise InvalidShape(
                        f"{takes.call.kind} draws {takes.width} x {takes.height} pixels only, got "
                        f"{name} {given}"
                    )
        width, height = sides["width"], sides["height"]
        with field("height"):
            check_pixels(self._limits, height, width)
        if image is not None:
            image = image.convert("RGB")
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.LANCZOS)
        if mask is not None:
            mask = mask.convert("L")
            if mask.size != (width, height):
                mask = mask.resize((width, height), Image.Resampling.BOX)
        return height, width, image, mask

    def _check_arguments(self, request: ImageRequest) -> None:
        """Refuse fields that the family does not have, or would ignore."""
        names = ("negative_prompt", "guidance_scale", "image_strength")
        given = [name for name in names if getattr(request, name) not in (None, "")]
        try:
            self.takes.call.check(given)
        except UnsupportedNetwork as error:
            refusal = InvalidRequest(str(error))
            refusal.field = error.field
            raise refusal from error

    def _guidance_scale(self, request: ImageRequest) -> dict[str, float | None]:
        """Return the argument of guidance, if there is one."""
        name, scale = self.takes.call.argument("guidance_scale"), request.guidance_scale
        if name is None:
            return {}
        if scale is None:
            own = self._guidance
            return {name: self.takes.call.defaults[name] if own is None else own}
        with field("guidance_scale"):
            try:
                value = math.nan if isinstance(scale, (str, bool)) else float(scale)  # type: ignore[arg-type]
            except TypeError:
                raise InvalidRequest(
                    f"{self.takes.call.kind} guides all objectives alike: give one number, got "
                    f"{scale!r}"
                ) from None
            if not 0 <= value < math.inf:
                raise InvalidSchedule(f"guidance_scale must be finite and >= 0, got {scale!r}")
            return {name: value}

    def _image_strength(self, request: ImageRequest, steps: int) -> dict[str, float]:
        """Return how much noise the image is given, if the call says that."""
        name, value = self.takes.call.argument("image_strength"), request.image_strength
        if name is None:
            return {}
        with field("image_strength"):
            if value is None:
                value = float(self.takes.call.defaults[name])
            if isinstance(value, (str, bool)) or not 0 <= value <= 1:
                raise InvalidRequest(f"image_strength must be in [0, 1], got {value!r}")
            if steps * value < 1:
                raise InvalidRequest(
                    f"image_strength {value:g} leaves none of {steps} steps: give more of either"
                )
            return {name: float(value)}

    def _regions(self, request: ImageRequest, height: int, width: int) -> Regions | None:
        """Return where objectives act, if the request says that."""
        with field("mask_softness"):
            check_softness(request.mask_softness, request.masks)
        with field("masks"):
            return check_masks(
                request.masks,
                list(self._pipe.objectives),
                1,
                height,
                width,
                softness=request.mask_softness,
            )

    def _preferences(
        self, request: ImageRequest, steps: int, regions: Regions | None
    ) -> CallPreferences:
        """Return the preferences of one image, as its call alone would have them."""
        names = list(self._pipe.objectives)
        one = Batch(1, 1, steps, takes_generator=True, given={})

        def of(regions: Regions | None) -> CallPreferences:
            return CallPreferences.of(one, request.weights, names, regions, extrapolate=False)

        with field("weights"):
            prefers = of(None)
        with field("masks"):
            return prefers if regions is None else of(regions)


def _sent(request: ImageRequest, prefers: CallPreferences) -> Any:  # noqa: ANN401 - see `StockImage`
    """The weights of one image as its call gets them."""
    weights: Any = request.weights
    if not has_ranges(weights, prefers.names):
        return prefers.rows
    if isinstance(weights, (list, tuple)):  # of one
        (weights,) = weights
    return {
        key: preference_weights(form, prefers.names, 1)[0].tolist() for key, form in weights.items()
    }

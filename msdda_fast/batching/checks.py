# SPDX-License-Identifier: Apache-2.0
"""What admission asks of the pipeline that a request is for, and how errors get their field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from msdda_fast.batching.limits import Limits
from msdda_fast.batching.request import ImageRequest
from msdda_fast.batching.ticket import Shape, described
from msdda_fast.errors import InvalidRequest, InvalidWeights, MSDDAError
from msdda_fast.types import ZeroVariancePolicy

__all__ = ["Checks", "check_cost", "check_pixels", "field"]


class Checks(Protocol):
    """Checks requests for one pipeline; thread-safe."""

    def check_text(self, text: Any) -> None:  # noqa: ANN401 - it is what is checked
        """Check that a prompt is read to its end.

        Raises:
            InvalidRequest: It is not.
        """

    def of(
        self, request: ImageRequest, count: int, zero_variance: ZeroVariancePolicy
    ) -> tuple[Shape, dict[str, Any]]:
        """Check what a request asks of the pipeline.

        Args:
            request: Of which prompts, seed, timeout and `on_step` are checked already.
            count: How many images.
            zero_variance: See `Admission.tickets`.

        Returns: Its shape, and further fields of its tickets.

        Raises:
            MSDDAError: It cannot be drawn; `field` of the error names the wrong field.
        """

    def native_size(self) -> tuple[int, int]:
        """Default width and height, in pixels."""

    def plain(
        self, num_inference_steps: int, height: int | None = None, width: int | None = None
    ) -> list[ImageRequest]:
        """Return requests that need all that requests of a shape need of the pipeline.

        Args:
            num_inference_steps: T.
            height, width: In pixels; None: the model's own.
        """


def check_pixels(limits: Limits, height: int, width: int) -> None:
    """Raise `InvalidRequest` if an image is too large."""
    if height * width > limits.max_pixels:
        raise InvalidRequest(
            f"an image of {height} x {width} pixels has more than max_pixels={limits.max_pixels}"
        )


def check_cost(
    limits: Limits, count: int, height: int, width: int, steps: int, frames: int = 1
) -> None:
    """Raise `InvalidRequest` if a request is too much work."""
    if (cost := count * frames * height * width * steps) > limits.max_cost:
        each = "" if frames == 1 else f"{frames} frames x "
        raise InvalidRequest(
            f"{count} images x {each}{height} x {width} pixels x {steps} steps = {cost} is more "
            f"than max_cost={limits.max_cost}: ask for fewer images, pixels or steps"
        )


@contextmanager
def field(name: str) -> Iterator[None]:
    """Set `field` on errors raised in the context, and give those of others a name."""
    try:
        yield
    except MSDDAError as error:
        error.field = name
        raise
    except Exception as error:  # of a callable, or of a value of an unexpected type
        kind = InvalidWeights if name == "weights" else InvalidRequest
        refusal = kind(f"{name} cannot be used: {described(error)}")
        refusal.field = name
        raise refusal from error

# SPDX-License-Identifier: Apache-2.0
"""What the operator decides; a request cannot change any of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ServeSettings", "client_limit", "public_name", "sides"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits of a service, validated on construction.

    Attributes:
        model: The name under which the model is served; clients see it, so it is no path.
        sizes: Image sizes that requests may ask for, "WIDTHxHEIGHT" in pixels; the first one is
            the default. Empty: the model's own size.
        steps: T of requests that do not set it, in [1, max_steps].
        guidance_scale: That of requests that do not set it; None: the model's own.
        max_steps: Largest T.
        max_images: Largest n of one request, at least 1.
        max_cost: Largest n * T * pixels of one request, with pixels in images of the default size:
            8 images of that size with 64 steps cost 512.
        max_prompt_chars: Longest prompt, and longest negative prompt, in characters.
        max_body_bytes: Longest body of a request; of one with images, longest field.
        max_image_bytes: Longest body of a request with images.
        max_image_pixels: Largest width x height of an image that is sent.
        timeout_s: Seconds after which a request is abandoned, > 0.
        api_key: What clients must send as a bearer token, or several such keys, one a line; spaces
            around a key do not count. None: no key is needed.
        is_local: Whether requests must name this machine itself as their host, so that no web page
            can reach a service on loopback through a name that it lets point there.
        log_prompts: Whether prompts are logged.
    """

    model: str
    sizes: tuple[str, ...] = ()
    steps: int = 25
    guidance_scale: float | None = None
    max_steps: int = 64
    max_images: int = 8
    max_cost: float = 512.0
    max_prompt_chars: int = 1000
    max_body_bytes: int = 2**20
    max_image_bytes: int = 2**24
    max_image_pixels: int = 2**24
    timeout_s: float = 120.0
    api_key: str | None = field(default=None, repr=False)
    is_local: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for size in self.sizes:
            sides(size)
        for name in (
            "max_images", "max_prompt_chars", "max_body_bytes", "max_image_bytes",
            "max_image_pixels", "steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps > self.max_steps:
            raise ValueError(f"steps is {self.steps}, more than max_steps={self.max_steps}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.api_key is not None and not self.keys:
            raise ValueError("the API key is empty; unset it to serve without a key")
        if not all(key.isprintable() for key in self.keys):
            raise ValueError("the API key has a character that no client can send in a header")

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that open the service; none: it is open."""
        lines = (self.api_key or "").split("\n")
        return tuple(key for line in lines if (key := line.strip()))

    def cost(self, count: int, steps: int, size: str, default: str) -> float:
        """Return n * T * pixels, with pixels in images of the default size."""
        (width, height), (own_width, own_height) = sides(size), sides(default)
        return count * steps * (width * height) / (own_width * own_height)


def client_limit(queue_limit: int, max_images: int) -> int:
    """Return how many images of one client may wait: half the queue, or its largest request."""
    return min(queue_limit, max((queue_limit + 1) // 2, max_images))


def public_name(model: str) -> str:
    """Return the name to serve a model under: of a path, its last part only."""
    return Path(model).resolve().name if Path(model).exists() else model


def sides(size: str) -> tuple[int, int]:
    """Read "WIDTHxHEIGHT" as (width, height) in pixels.

    Raises:
        ValueError: The text does not have this form.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if match is None:
        raise ValueError(f"size {size!r} must be WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])

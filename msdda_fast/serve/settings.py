# SPDX-License-Identifier: Apache-2.0
"""What the operator decides; a request cannot change any of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["ServeSettings", "sides"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits of a service, validated on construction.

    Attributes:
        model: The name under which the model is served.
        sizes: Image sizes that requests may ask for, "WIDTHxHEIGHT" in pixels; the first one is
            the default. Empty: the model's own size.
        steps: T of requests that do not set it, in [1, max_steps].
        max_steps: Largest T.
        max_images: Largest n of one request, at least 1.
        max_prompt_chars: Longest prompt, and longest negative prompt, in characters.
        max_body_bytes: Longest body of a request.
        timeout_s: Seconds after which a request is abandoned, > 0.
        api_key: What clients must send as a bearer token; None: no key is needed.
        log_prompts: Whether prompts are logged.
    """

    model: str
    sizes: tuple[str, ...] = ()
    steps: int = 25
    max_steps: int = 64
    max_images: int = 8
    max_prompt_chars: int = 1000
    max_body_bytes: int = 65_536
    timeout_s: float = 120.0
    api_key: str | None = field(default=None, repr=False)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for size in self.sizes:
            sides(size)
        for name in ("max_images", "max_prompt_chars", "max_body_bytes", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps > self.max_steps:
            raise ValueError(f"steps is {self.steps}, more than max_steps={self.max_steps}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the API key is empty; unset it to serve without a key")


def sides(size: str) -> tuple[int, int]:
    """Read "WIDTHxHEIGHT" as (width, height) in pixels.

    Raises:
        ValueError: The text does not have this form.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if match is None:
        raise ValueError(f"size {size!r} must be WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])

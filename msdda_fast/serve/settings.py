# SPDX-License-Identifier: Apache-2.0
"""What an operator decides; nothing of it can be changed by a request."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["ServeSettings", "sides"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Limits of a service, checked at birth.

    Attributes:
        model: The name that it serves the model by.
        sizes: Sizes of images, "WIDTHxHEIGHT" in pixels, that may be asked for; the first one is
            the default. Empty: the model's own.
        steps: T where a request does not say, in [1, max_steps].
        max_steps: Largest T.
        max_images: Largest n of one request, at least 1.
        max_prompt_chars: Longest prompt, and longest negative prompt, in characters.
        max_body_bytes: Longest body of a request.
        timeout_s: > 0, seconds until a request is given up.
        api_key: What clients must send as a bearer token; None: anybody may.
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
            raise ValueError("the API key is empty; unset it to let anybody in")


def sides(size: str) -> tuple[int, int]:
    """Read "WIDTHxHEIGHT" as (width, height) in pixels.

    Raises:
        ValueError: The text has another form.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if match is None:
        raise ValueError(f"size {size!r} must be WIDTHxHEIGHT in pixels, such as 512x512")
    return int(match[1]), int(match[2])

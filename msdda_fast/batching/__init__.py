# SPDX-License-Identifier: Apache-2.0
"""Requests from many callers, drawn by one pipeline in shared batches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdda_fast.batching.engine import Engine
    from msdda_fast.batching.request import GeneratedImage, ImageRequest

__all__ = ["Engine", "GeneratedImage", "ImageRequest"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    # the engine imports diffusers, which takes seconds
    if name == "Engine":
        from msdda_fast.batching.engine import Engine

        return Engine
    if name in ("GeneratedImage", "ImageRequest"):
        from msdda_fast.batching import request

        return getattr(request, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

# SPDX-License-Identifier: Apache-2.0
"""diffusers pipelines with a `weights=` argument. The only room that knows diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdda_fast.pipeline.batching.engine import Engine
    from msdda_fast.pipeline.batching.request import GeneratedImage, ImageRequest
    from msdda_fast.pipeline.stable_diffusion import MSDDAPipeline

__all__ = ["Engine", "GeneratedImage", "ImageRequest", "MSDDAPipeline"]

_PLACES = {
    "Engine": "batching.engine",
    "GeneratedImage": "batching.request",
    "ImageRequest": "batching.request",
    "MSDDAPipeline": "stable_diffusion",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    # importing diffusers takes seconds and prints notices; `environment` and `notices` need neither
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

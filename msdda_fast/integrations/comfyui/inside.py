# SPDX-License-Identifier: Apache-2.0
"""What these nodes import of ComfyUI, which is there only when it runs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from msdda_fast.errors import BackendUnavailable

__all__ = ["inside"]


def inside(module: str) -> Any:  # noqa: ANN401 - ComfyUI is not there to be typed
    """Import a module of ComfyUI; raise `BackendUnavailable` elsewhere."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"this node runs only inside ComfyUI: its module {module} cannot be imported ({error})"
        ) from error

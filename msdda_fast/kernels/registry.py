# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operator runs: looked up once, outside of any loop.

Every operator is a folder `kernels/<op>/` with one module `_<backend>.py` per backend, all with the
same raw functions. `auto` takes the first backend of the device's list that can run; a backend
asked for by name runs or raises `BackendUnavailable`. The variable MSDDA_BACKEND replaces `auto`;
this is the only module that reads it.
"""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

from msdda_fast.errors import BackendUnavailable

__all__ = ["available", "explain", "resolve"]

_ORDER = {"cpu": ("native", "eager")}  # by device type, best first; others: eager
_NAMES = ("eager", "native")


@cache
def _missing(backend: str) -> str:
    """What keeps `backend` from running here; empty if nothing does."""
    if backend == "native":
        try:
            import_module("msdda_fast._C")
        except ImportError as error:
            return (
                f"the compiled module msdda_fast._C is not there ({error}); install a C++17 "
                "compiler and run `pip install .` again"
            )
    return ""


def available(backend: str) -> bool:
    """Whether `backend` ("eager" or "native") can run on this machine."""
    return backend in _NAMES and not _missing(backend)


def explain() -> dict[str, str]:
    """Each backend with "ok", or the reason why it cannot run here."""
    return {name: _missing(name) or "ok" for name in _NAMES}


def resolve(op: str, backend: str, device_type: str) -> ModuleType:
    """The module that implements operator `op` ("fused_step", "counter_noise").

    Args:
        op: Folder name under `kernels/`.
        backend: "auto", or one of the backend names.
        device_type: `tensor.device.type` of the inputs.

    Raises:
        BackendUnavailable: `backend` is unknown, is not built here, or does not run on the device.
    """
    if backend == "auto":
        backend = os.environ.get("MSDDA_BACKEND") or "auto"
    return _resolve(op, backend, device_type)


@cache
def _resolve(op: str, backend: str, device_type: str) -> ModuleType:
    order = _ORDER.get(device_type, ("eager",))
    if backend == "auto":
        backend = next(name for name in order if available(name))
    elif backend not in _NAMES:
        accepted = ", ".join(repr(name) for name in ("auto", *_NAMES))
        raise BackendUnavailable(f"{op}: no backend {backend!r} in this build; known: {accepted}")
    elif missing := _missing(backend):
        raise BackendUnavailable(f"{op}: backend {backend!r} cannot run: {missing}")
    elif backend not in order:
        raise BackendUnavailable(
            f"{op}: backend {backend!r} does not run on {device_type!r}; there: {', '.join(order)}"
        )
    return import_module(f"msdda_fast.kernels.{op}._{backend}")

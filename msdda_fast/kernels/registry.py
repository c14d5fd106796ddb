# SPDX-License-Identifier: Apache-2.0
"""Chooses the implementation of an operator: looked up once, outside of any loop.

Every operator is a folder `kernels/<op>/` with one module `_<backend>.py` per backend, which
provides the raw functions that `kernels.raw` declares. `auto` takes the first backend of the
device's list that can run; a backend requested by name runs or raises `BackendUnavailable`. The
variable MSDDA_BACKEND replaces `auto`; this is the only module that reads it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast, overload

from msdda_fast.errors import BackendUnavailable
from msdda_fast.kernels import native

if TYPE_CHECKING:
    from msdda_fast.kernels.raw import (
        CounterNoiseBackend,
        FusedStepBackend,
        GroupedLoraBackend,
        GroupNormBackend,
        RowwiseBackend,
    )

    Backend = (
        FusedStepBackend
        | CounterNoiseBackend
        | GroupedLoraBackend
        | GroupNormBackend
        | RowwiseBackend
    )

__all__ = ["NAMES", "available", "chosen", "explain", "has", "resolve"]

NAMES = ("eager", "native", "triton")
#: What `auto` tries before eager, best first, by device type.
_ORDER = {"cpu": ("native",), "cuda": ("triton", "native")}


@cache
def _missing(backend: str, device_type: str) -> str:
    """Return why `backend` cannot run on such a device; empty if it can."""
    if backend == "native":
        return native.missing(device_type)
    if backend == "triton":
        return _triton_missing(device_type)
    return ""


def _triton_missing(device_type: str) -> str:
    try:
        import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error}); pip install 'msdda-fast[triton]'"
    if device_type != "cuda" and not _interpreted():
        return "triton needs a GPU; to run its interpreter on the CPU, set TRITON_INTERPRET=1"
    if device_type == "cuda" and not _interpreted():
        try:
            import_module("msdda_fast.kernels._triton_probe").launch()
        except Exception as error:  # a missing C compiler, a driver too old: of many kinds
            return f"triton cannot launch a kernel here ({type(error).__name__}: {error})"
    return ""


def _interpreted() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)


def has(op: str, backend: str) -> bool:
    """Return whether operator `op` is implemented for `backend`."""
    return find_spec(f"msdda_fast.kernels.{op}._{backend}") is not None


def available(backend: str, device_type: str = "cpu") -> bool:
    """Return whether `backend` can run on this machine's `device_type` (`tensor.device.type`)."""
    return backend in NAMES and not _missing(backend, device_type)


def explain(device_type: str = "cpu") -> dict[str, str]:
    """Return for each backend "ok", or why it cannot run on such a device here."""
    return {name: _missing(name, device_type) or "ok" for name in NAMES}


@overload
def resolve(op: Literal["fused_step"], backend: str, device_type: str) -> FusedStepBackend: ...


@overload
def resolve(
    op: Literal["counter_noise"], backend: str, device_type: str
) -> CounterNoiseBackend: ...


@overload
def resolve(op: Literal["grouped_lora"], backend: str, device_type: str) -> GroupedLoraBackend: ...


@overload
def resolve(op: Literal["group_norm"], backend: str, device_type: str) -> GroupNormBackend: ...


@overload
def resolve(op: Literal["rowwise"], backend: str, device_type: str) -> RowwiseBackend: ...


def resolve(op: str, backend: str, device_type: str) -> Backend:
    """Return the module that implements operator `op`; `kernels.raw` declares its functions.

    Args:
        op: Folder name under `kernels/`.
        backend: "auto", or one of `NAMES`.
        device_type: `tensor.device.type` of the inputs.

    Raises:
        BackendUnavailable: `backend` is unknown, is not built here, or does not run on the device.
    """
    if backend == "auto":
        backend = os.environ.get("MSDDA_BACKEND") or "auto"
    module = _module(op, _resolve(op, backend, device_type))
    return cast("Backend", module)


@cache
def _module(op: str, backend: str) -> ModuleType:
    return import_module(f"msdda_fast.kernels.{op}._{backend}")


def chosen(op: str, device_type: str) -> str:
    """Return the backend that `auto` selects."""
    return _resolve(op, "auto", device_type)


@cache
def _resolve(op: str, backend: str, device_type: str) -> str:
    if backend == "auto":
        names = [
            name
            for name in _ORDER.get(device_type, ())
            if has(op, name) and available(name, device_type)
        ]
        if "triton" in names and _interpreted():
            names.remove("triton")  # a thousand times slower: only by name
        return (*names, "eager")[0]
    if backend not in NAMES:
        accepted = ", ".join(repr(name) for name in ("auto", *NAMES))
        raise BackendUnavailable(f"{op}: no backend {backend!r} in this build; known: {accepted}")
    if not has(op, backend):
        raise BackendUnavailable(f"{op} is not implemented for backend {backend!r}")
    if missing := _missing(backend, device_type):
        raise BackendUnavailable(f"{op}: backend {backend!r} cannot run: {missing}")
    return backend

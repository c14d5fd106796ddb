# SPDX-License-Identifier: Apache-2.0
"""`msdda-fast doctor`: facts about this machine; it never fails."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from msdda_fast import assets
from msdda_fast.cli.session import out
from msdda_fast.kernels import native, verify
from msdda_fast.pipelines import families
from msdda_fast.pipelines.stock_schedulers import LINEAR
from msdda_fast.steps.schedulers import RULES

__all__ = ["doctor", "findings"]

_REQUIRED = ("msdda-fast", "torch", "diffusers", "transformers", "peft", "safetensors")
_OPTIONAL = ("accelerate", "triton")
_COMPILERS = ("c++", "g++", "clang++")


def findings() -> dict[str, dict[str, str]]:
    """Return what is installed and what is missing, by topic and name."""
    return {
        "Versions": {
            "python": f"{platform.python_version()} on {platform.platform()}",
            **{name: _version(name) or "missing" for name in _REQUIRED},
            **{name: _version(name) or "not installed (optional)" for name in _OPTIONAL},
        },
        "Devices": _devices(),
        **_kernels(),
        "Pipelines": _pipelines(),
        "Samplers": _samplers(),
        "Build tools": _build_tools(),
        "Models": {name: _model(name) for name in assets.SHIPPED},
    }


def _kernels() -> dict[str, dict[str, str]]:
    """Verify each operator's backends on every kind of device here, and say what was found."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        f"{op} on {kind}": backends
        for kind in kinds
        for op, backends in verify.report(kind).items()
    }


def _pipelines() -> dict[str, str]:
    """Those tested with objectives; others of diffusers are checked at their first call."""
    stock = {family: ", ".join(names) for family, names in families.TESTED.items()}
    return {"Stable Diffusion 1 and 2": "MSDDAPipeline", **stock}


def _samplers() -> dict[str, str]:
    return {
        "at any noise levels": ", ".join(RULES),
        "at equal ones": ", ".join(sorted(LINEAR - set(RULES))),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if len(devices) == 1:
        devices["cuda"] = "none"
    return devices


def _build_tools() -> dict[str, str]:
    names = (os.environ.get("CXX"), *_COMPILERS)
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    return {
        "C++ compiler": compiler or f"none of {', '.join(_COMPILERS)} found; not needed to run",
        "nvcc": shutil.which("nvcc") or "not found; not needed to run",
        "C++ kernels": native.missing("cpu") or "compiled in",
        "CUDA kernels": native.missing("cuda") or "compiled in",
    }


def _model(name: str) -> str:
    try:
        return f"in {assets.resolve(name)}"
    except FileNotFoundError as error:
        return str(error)


def doctor() -> None:
    """Show what is installed, which backends can run here, and why the others cannot."""
    from rich.table import Table

    for title, rows in findings().items():
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, finding in rows.items():
            table.add_row(name, finding)
        out.print(table)

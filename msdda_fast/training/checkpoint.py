# SPDX-License-Identifier: Apache-2.0
"""Read what earlier runs left, and name it where it is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

_ADVICE = "delete it to start this run again, or use another folder"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, with all tensors on the CPU.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is empty, damaged, or no checkpoint of a run; the message names it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch each have their own
        raise ValueError(f"{path} is empty or damaged; {_ADVICE}") from error
    if not isinstance(state, dict) or "identity" not in state:
        raise ValueError(f"{path} is not the checkpoint of a training run; {_ADVICE}")
    return state


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of an earlier run.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged; the message names it.
    """
    with _named(path):
        return load_file(path)


def read_header(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file of an earlier run; errors as `load_tensors`."""
    with _named(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it is made again") from error

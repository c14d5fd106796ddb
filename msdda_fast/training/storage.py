# SPDX-License-Identifier: Apache-2.0
"""Files that survive a kill: atomic writes, and refusal to mix two runs in one folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from msdda_fast.errors import MSDDAError


class ResumeMismatch(MSDDAError, ValueError):
    """The folder holds the work of a run with another configuration or other data."""


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place.

    A reader sees the old file or the whole new one, never a part, whenever the process dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def digest(*tensors: Tensor) -> str:
    """SHA-256 over shapes, dtypes and bytes of `tensors`, as 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def require_same(folder: Path, stored: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Check that the run stored in `folder` is the wanted one.

    Raises:
        ResumeMismatch: some entry differs; the message lists each with both values.
    """
    different = [
        f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key)
    ]
    if different:
        raise ResumeMismatch(
            f"{folder} holds another run: {'; '.join(different)}. "
            "Use the same values to resume it, or another folder to start anew."
        )

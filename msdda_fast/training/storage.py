# SPDX-License-Identifier: Apache-2.0
"""Keep two different runs from sharing one folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from msdda_fast.errors import MSDDAError


class ResumeMismatch(MSDDAError, ValueError):
    """The folder holds the work of a run with another configuration or other data."""


def digest(*tensors: Tensor) -> str:
    """Return the SHA-256 over shapes, dtypes and bytes of `tensors`, as 64 hexadecimal digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def require_same(folder: Path, stored: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Check that the run stored in `folder` is the wanted one.

    Raises:
        ResumeMismatch: Entries differ; the message lists each with both values.
    """
    different = [
        f"{key} is {stored.get(key)!r} there and {wanted.get(key)!r} here"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key)
    ]
    if different:
        raise ResumeMismatch(
            f"{folder} holds another run: {'; '.join(different)}. "
            "Use the same values to resume it, or another folder to start a new run."
        )

# SPDX-License-Identifier: Apache-2.0
"""Files of tensors whose bytes depend on nothing but their content."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from msdda_fast.files import write_atomically

_LENGTH = 8  # bytes that give the length of the header, which is a multiple of it


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; equal content makes equal bytes.

    safetensors itself writes the entries of the metadata in a random order.
    """
    data = save(dict(tensors), dict(metadata or {}))
    start = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:start])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    length = len(text).to_bytes(_LENGTH, "little")
    write_atomically(path, lambda partial: partial.write_bytes(length + text + data[start:]))


def canonical(state: Any) -> Any:  # noqa: ANN401 - what torch.save takes
    """Return a state in which equal texts are one object, and no two containers are.

    Which of them are is part of a pickle's bytes, and differs between a state that was made and the
    same state read back.
    """
    if isinstance(state, str):
        return sys.intern(state)
    if isinstance(state, Mapping):
        return {canonical(key): canonical(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)([canonical(value) for value in state])
    return state

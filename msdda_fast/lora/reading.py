# SPDX-License-Identifier: Apache-2.0
"""The tensors and the header of an adapter's file, bounded before they are read.

Adapters come from strangers: a header says how much there is, so it is looked at first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msdda_fast.errors import InvalidAdapter

__all__ = ["read_adapter_file"]

#: The largest adapters of SDXL have some 3,000 tensors, with half a megabyte of header; captions
#: and tags of the training set, which kohya's trainer adds, make a few megabytes more.
_MAX_HEADER = 32 * 2**20
_MAX_TENSORS = 20_000
_MAX_NAME = 512
#: Kinds of adapters by what their keys have; what they do to a weight is not B A.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".ia3_": "IA3",
    ".hra_u": "HRA",
    ".lora_mid": "Tucker (lora_mid)",
}


def read_adapter_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of one safetensors file, on the CPU, in the dtype they are stored in.

    Returns: The tensors, and the header's own entries.

    Raises:
        InvalidAdapter: The file is damaged, larger than adapters are, has no LoRA weights, a kind
            that cannot be fused (DoRA), or a tensor that is not finite floating-point numbers.
    """
    header = _header(file)
    metadata = header.pop("__metadata__", {})
    for key in header:
        for part, kind in _OTHER_KINDS.items():
            if part in key:
                raise InvalidAdapter(
                    f"{file} is a {kind} adapter ({key!r}), which is not supported; use LoRA"
                )
    if not any("lora" in key for key in header):
        raise InvalidAdapter(f"{file} holds no LoRA weights; its first key is {_first(header)}")
    try:
        state_dict: dict[str, Tensor] = load_file(file)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InvalidAdapter(f"{file} is not a readable safetensors file: {error}") from error
    for key, tensor in state_dict.items():
        _check_numbers(file, key, tensor)
    return state_dict, metadata


def _header(file: Path) -> dict[str, Any]:
    """Return the header, which is JSON: tensors by name, and `__metadata__`."""
    with file.open("rb") as opened:
        length = opened.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        if size > min(_MAX_HEADER, file.stat().st_size):
            raise InvalidAdapter(
                f"{file} is not a readable safetensors file: its header claims {size} bytes"
            )
        text = opened.read(size)
    try:
        header = json.loads(text.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{file} is not a readable safetensors file: {error}") from error
    if len(header) > _MAX_TENSORS:
        raise InvalidAdapter(
            f"{file} names {len(header)} tensors; adapters have at most {_MAX_TENSORS}"
        )
    if long := next((key for key in header if len(key) > _MAX_NAME), None):
        raise InvalidAdapter(f"{file} has a tensor's name of {len(long)} characters: {long[:40]}…")
    return header


def _check_numbers(file: Path, key: str, tensor: Tensor) -> None:
    # kohya's trainer stores a whole alpha as an integer
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise InvalidAdapter(
            f"{file} is not a LoRA in floating point: {key!r} is {str(tensor.dtype)[6:]}"
        )
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
    if not bool(torch.isfinite(wide).all()):
        raise InvalidAdapter(
            f"{file} holds NaN or infinity, as broken training leaves behind; first in {key!r}"
        )


def _first(header: Mapping[str, object]) -> str:
    return repr(next(iter(header), None))

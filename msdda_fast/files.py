# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file is complete or absent, whenever the process dies. And strangers' JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["read_json", "write_atomically"]

_MAX_JSON = 32 * 2**20


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    A reader sees the old file or the whole new one, never a part. If `write` raises, the old file
    stays and the temporary one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path, kind: str) -> dict[str, Any]:
    """Read a JSON file of at most 32 MiB that holds an object; `kind` says what it should be.

    Raises:
        ValueError: It does not; one line with the file's name.
    """
    try:
        if (size := file.stat().st_size) > _MAX_JSON:
            raise ValueError(f"it has {size} bytes")
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {found!r:.80}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not {kind} in JSON: {error}") from error
    return found

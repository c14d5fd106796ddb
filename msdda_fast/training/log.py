# SPDX-License-Identifier: Apache-2.0
"""The log of a run: one JSON object per line, without duplicates after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from msdda_fast.files import write_atomically

LOG_NAME = "log.jsonl"


@contextmanager
def open_log(out_dir: Path, start: int, key: str) -> Iterator[TextIO]:
    """Open the log for appending, without the rows after `start` (by `key`) that a kill left."""
    kept = [row for row in read_log(out_dir) if row[key] <= start]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    path = out_dir / LOG_NAME
    write_atomically(path, lambda partial: partial.write_text(text))
    with path.open("a", buffering=1) as log:
        yield log


def read_log(out_dir: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a log, if there is one; a kill may have torn the last row."""
    path = out_dir / LOG_NAME
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

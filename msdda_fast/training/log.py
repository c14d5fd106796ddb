# SPDX-License-Identifier: Apache-2.0
"""The log of a run: one JSON object per line, without duplicates after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msdda_fast.files import write_atomically

LOG_NAME = "log.jsonl"


class RunLog:
    """Appends rows to the log of a run.

    The first row drops those of a killed run that are made again. Of all columns, only `seconds`
    differs between two runs of the same settings on one machine.

    Args:
        out_dir: Folder of the run.
        start: Last row, by `key`, that is kept.
        key: First column.
    """

    def __init__(self, out_dir: Path, start: int, key: str) -> None:
        self._path, self._start, self._key = out_dir / LOG_NAME, start, key
        self._open = False

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        if not self._open:
            kept = [old for old in read_rows(self._path) if old[self._key] <= self._start]
            text = "".join(json.dumps(old) + "\n" for old in kept)
            write_atomically(self._path, lambda partial: partial.write_text(text))
            self._open = True
        with self._path.open("a") as log:
            log.write(json.dumps(row) + "\n")


def read_log(out_dir: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a run's log."""
    return read_rows(out_dir / LOG_NAME)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a file, if there is one; a kill may have torn the last row."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]

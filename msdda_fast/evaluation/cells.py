# SPDX-License-Identifier: Apache-2.0
"""The files of a sweep: one image per finished cell, written atomically.

A cell is a PNG file with the fingerprint of its settings in a text chunk.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from msdda_fast import resume
from msdda_fast.files import write_atomically

__all__ = ["Cell", "SweepFolder"]

_CHUNK = "msdda_fast settings"


@dataclass(frozen=True, slots=True)
class Cell:
    """One image of a sweep: a prompt at a preference (None: the base model), from one seed."""

    prompt: str
    weight: float | None
    seed: int

    @property
    def file_name(self) -> str:
        """Unique name of the cell: words of the prompt, its checksum, weight and seed."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40]
        checksum = zlib.crc32(self.prompt.encode())
        column = "base" if self.weight is None else f"w{self.weight!r}"
        return f"{words}-{checksum:08x}_{column}_seed{self.seed}.png"


class SweepFolder:
    """A folder of finished cells, bound to the settings that made them.

    Args:
        path: Created with the first cell.
        settings: JSON values; everything but prompts, weights and seeds that an image depends on.
        cells: The cells that will be read; those that are there are compared.

    Raises:
        ResumeMismatch: The folder or a cell was made with other settings; the message names them.
        ValueError: A cell is not an image.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], cells: Iterable[Cell]) -> None:
        self.path, self._settings = path, dict(settings)
        self._cells = path / "cells"
        kept = [cell for cell in cells if self.has(cell)]
        found = ((self._file(cell), self._mark(cell), self._identity(cell)) for cell in kept)
        resume.check(path, settings, results=found)

    def has(self, cell: Cell) -> bool:
        """Whether the cell is finished."""
        return self._file(cell).exists()

    def add(self, cell: Cell, image: Image.Image) -> bool:
        """Store a finished cell, unless it is stored already; return whether it was not.

        Raises:
            ResumeMismatch: Another process filled the folder with cells of other settings.
        """
        if self.has(cell):
            return False
        self.bind()
        text = PngInfo()
        mark = json.dumps(resume.mark(self._identity(cell)))
        text.add_text(_CHUNK, mark, zip=True)
        write_atomically(
            self._file(cell), lambda file: image.save(file, format="PNG", pnginfo=text)
        )
        return True

    def bind(self) -> None:
        """Make this the folder of these settings.

        Raises:
            ResumeMismatch: It became that of others in the meantime.
        """
        resume.bind(self.path, self._settings)

    def load(self, cell: Cell) -> Image.Image:
        """Read a finished cell.

        Raises:
            ValueError: The file is not an image.
        """
        with self._open(cell) as image:
            return image.convert("RGB")

    def relative(self, cell: Cell) -> str:
        """Return the path of a cell inside the folder."""
        return f"{self._cells.name}/{cell.file_name}"

    def _file(self, cell: Cell) -> Path:
        return self._cells / cell.file_name

    def _identity(self, cell: Cell) -> dict[str, Any]:
        return {**self._settings, **asdict(cell)}

    def _mark(self, cell: Cell) -> dict[str, Any] | None:
        with self._open(cell) as image:
            text = image.info.get(_CHUNK)
        return None if text is None else json.loads(text)

    def _open(self, cell: Cell) -> Image.Image:
        file = self._file(cell)
        try:
            return Image.open(file)
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{file} is not an image; delete it and run the sweep again"
            ) from error

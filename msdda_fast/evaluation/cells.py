# SPDX-License-Identifier: Apache-2.0
"""The files of a sweep: one image per finished cell, written atomically."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from msdda_fast.evaluation.settings import bind_settings
from msdda_fast.files import write_atomically

__all__ = ["Cell", "SweepFolder"]


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
        path: Created if missing.
        settings: JSON values; everything but prompts, weights and seeds that an image depends on.

    Raises:
        SettingsConflict: The folder was made with other settings; the message names them.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._cells = path / "cells"
        bind_settings(path, settings)

    def has(self, cell: Cell) -> bool:
        """Whether the cell is finished."""
        return (self._cells / cell.file_name).exists()

    def add(self, cell: Cell, image: Image.Image) -> None:
        """Store a finished cell, unless it is stored already."""
        if not self.has(cell):
            write_atomically(
                self._cells / cell.file_name, lambda file: image.save(file, format="PNG")
            )

    def load(self, cell: Cell) -> Image.Image:
        """Read a finished cell.

        Raises:
            ValueError: The file is not an image.
        """
        file = self._cells / cell.file_name
        try:
            with Image.open(file) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            raise ValueError(
                f"{file} is not an image; delete it and run the sweep again"
            ) from error

    def relative(self, cell: Cell) -> str:
        """Return the path of a cell inside the folder."""
        return f"{self._cells.name}/{cell.file_name}"

# SPDX-License-Identifier: Apache-2.0
r"""Preference pairs from a folder of images.

The folder holds one table, `pairs.jsonl` or `pairs.csv`, with a prompt and two images per row:

    {"prompt": "a red dog", "chosen": "images/0.png", "rejected": "images/1.png"}

or, as CSV, the header `prompt,chosen,rejected` and one row per pair. Paths are relative to the
folder; an image may be in any number of rows. Blank lines are ignored. Images whose size differs
from the model's are resized by their shorter side and cropped around the centre.
"""

from __future__ import annotations

import csv
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msdda_fast.errors import MSDDAError
from msdda_fast.training.pairs import PreferencePairs
from msdda_fast.training.storage import write_tensors

TABLES = ("pairs.jsonl", "pairs.csv")
COLUMNS = ("prompt", "chosen", "rejected")
_SHOWN = 10  # errors of one table
#: Of one image: a few kilobytes of PNG may claim any size, and take that much memory when decoded.
_MAX_PIXELS = 8192 * 8192
_BATCH = 16  # images encoded together


class InvalidPairs(MSDDAError, ValueError):
    """A table of preference pairs is invalid; the message gives the number of each bad line."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """One line of a table, whose files are readable images."""

    prompt: str
    chosen: Path
    rejected: Path


def read_pairs(folder: str | Path) -> list[PairRow]:
    """Read and check the table of `folder`; no image is decoded yet.

    Raises:
        FileNotFoundError: `folder` has no table.
        InvalidPairs: There are both tables, an empty one, or bad lines: not JSON, other columns, an
            empty prompt, a file that is missing, not an image or one of more than 8192 x 8192
            pixels, an image preferred to itself.
    """
    folder = Path(folder)
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if not tables:
        raise FileNotFoundError(f"no {' or '.join(TABLES)} in {folder}")
    if len(tables) > 1:
        raise InvalidPairs(f"{folder} has both {' and '.join(TABLES)}; keep one of them")
    (table,) = tables
    parse = _jsonl if table.suffix == ".jsonl" else _csv
    rows: list[PairRow] = []
    errors: list[str] = []
    readable: dict[Path, str | None] = {}
    for number, found in parse(table):
        row = found if isinstance(found, str) else _row(found, folder, readable)
        if isinstance(row, str):
            errors.append(f"line {number}: {row}")
        else:
            rows.append(row)
    if errors:
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise InvalidPairs(f"{table}: {'; '.join(errors[:_SHOWN])}{more}")
    if not rows:
        raise InvalidPairs(f"{table} has no pairs")
    return rows


def _jsonl(table: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(table.read_text("utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, f"not JSON ({error})"


def _csv(table: Path) -> Iterator[tuple[int, Any]]:
    with table.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            yield reader.line_num, f"not CSV ({error})"


def _row(found: Any, folder: Path, readable: dict[Path, str | None]) -> PairRow | str:  # noqa: ANN401 - from outside
    """Return the row of a line, or what is wrong with it."""
    if not isinstance(found, dict) or set(found) != set(COLUMNS):
        columns = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        return f"expected the columns {', '.join(COLUMNS)}, got {columns}"
    for name in COLUMNS:
        if not isinstance(found[name], str) or not found[name].strip():
            return f"{name} must be non-empty text, got {found[name]!r}"
    chosen, rejected = (folder / found[name] for name in COLUMNS[1:])
    for path in (chosen, rejected):
        if path not in readable:
            readable[path] = _problem(path)
        if problem := readable[path]:
            return problem
    if chosen == rejected:
        return f"{found['chosen']} is preferred to itself"
    return PairRow(found["prompt"], chosen, rejected)


def _problem(path: Path) -> str | None:
    if not path.is_file():
        return f"no file at {path}"
    try:
        with _open(path) as image:
            image.verify()
    except InvalidPairs as error:
        return str(error)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        return f"{path} is not a readable image ({error})"
    return None


def _open(path: Path) -> Image.Image:
    """Read the header of an image, whose pixels are decoded when they are asked for."""
    with warnings.catch_warnings():
        # Pillow's own bound warns at 89 million pixels, and raises at twice as many
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            raise InvalidPairs(f"{path} is too large to decode ({error})") from error
    if image.width * image.height > _MAX_PIXELS:
        image.close()
        raise InvalidPairs(
            f"{path} is too large to decode: {image.width} x {image.height} pixels, at most "
            f"{_MAX_PIXELS} are read"
        )
    return image


def encode_pairs(
    rows: list[PairRow],
    encode: Callable[[Tensor], Tensor],
    size: tuple[int, int],
    codec: str,
    cache: Path,
    *,
    progress: bool = True,
) -> tuple[PreferencePairs, list[str]]:
    """Encode each image once and return the pairs, with the prompts that they index.

    Args:
        rows: The rows from `read_pairs`.
        encode: Maps images (b, 3, height, width) in [0, 1] to latents (b, C, H, W).
        size: (height, width) that `encode` takes, in pixels.
        codec: Identifies the encoder: latents of another one are not reused.
        cache: File of latents by image content; read if it exists, and written with new ones.
        progress: Show a progress bar with the time left.
    """
    paths = dict.fromkeys(path for row in rows for path in (row.chosen, row.rejected))
    keys = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    identity = {"codec": codec, "size": f"{size[0]}x{size[1]}"}
    latents = _cached(cache, identity)
    missing = list({keys[path]: path for path in paths if keys[path] not in latents}.values())
    starts, terminal = range(0, len(missing), _BATCH), Console(stderr=True)
    for at in track(starts, "encoding", console=terminal, disable=not progress):
        part = missing[at : at + _BATCH]
        encoded = encode(torch.stack([load_image(path, size) for path in part]))
        latents |= {keys[path]: row.cpu() for path, row in zip(part, encoded, strict=True)}
    if missing:
        tensors = {key: row.contiguous().clone() for key, row in latents.items()}
        write_tensors(cache, tensors, identity)
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    pairs = PreferencePairs(
        torch.stack([latents[keys[row.chosen]] for row in rows]),
        torch.stack([latents[keys[row.rejected]] for row in rows]),
        torch.tensor([prompts.index(row.prompt) for row in rows]),
    )
    return pairs, prompts


def _cached(cache: Path, identity: dict[str, str]) -> dict[str, Tensor]:
    if not cache.is_file():
        return {}
    try:
        with safe_open(cache, framework="pt") as file:
            if file.metadata() != identity:
                return {}
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError:
        return {}  # damaged: encoded anew, as what is missing


def load_image(path: Path, size: tuple[int, int]) -> Tensor:
    """Read an image as (3, height, width) in [0, 1], resized and cropped to `size`.

    Raises:
        InvalidPairs: It has more than 8192 x 8192 pixels.
    """
    with _open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    height, width = size
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255

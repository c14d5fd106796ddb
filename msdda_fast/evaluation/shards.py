# SPDX-License-Identifier: Apache-2.0
"""The two files of a shard: a JSON record with scores, and a strip of images.

The record is written last, so a shard with a record is complete. It carries the fingerprints of
the images and of each reward that scored them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdda_fast import resume
from msdda_fast.evaluation.settings import write_json
from msdda_fast.files import write_atomically

__all__ = ["Shard", "cut", "fingerprints", "keep", "pixels_of", "read_record", "strip"]


class Shard(NamedTuple):
    """The contents of a shard's two files."""

    record: dict[str, Any]
    strip: bytes


def keep(
    file: Path, shard: Shard, identity: Mapping[str, Any], scored_by: Mapping[str, str]
) -> None:
    """Write a drawn shard, with the fingerprints of its images and of its scores."""
    write_atomically(file.with_suffix(".png"), lambda partial: partial.write_bytes(shard.strip))
    marks = {"settings": resume.mark(identity), "scored_by": dict(scored_by)}
    write_json(file, {**shard.record, **marks})


def read_record(file: Path) -> dict[str, Any]:
    """Read a shard's record."""
    record: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return record


def fingerprints(
    record: Mapping[str, Any], identity: Mapping[str, Any], scored_by: Mapping[str, str]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the fingerprint that a record carries and the one that it should.

    Of the rewards they have those that both name: a record may have more, and gets those it lacks.
    """
    if "settings" not in record:
        return None, dict(identity)
    shared = record["scored_by"].keys() & scored_by.keys()
    stored, wanted = (
        {name: by[name] for name in sorted(shared)} for by in (record["scored_by"], scored_by)
    )
    return {**record["settings"], "scored_by": stored}, {**identity, "scored_by": wanted}


def cut(file: Path, count: int) -> list[Image.Image]:
    """Return the images of a shard's strip."""
    with Image.open(file.with_suffix(".png")) as image:
        width = image.width // count
        return [image.crop((i * width, 0, (i + 1) * width, image.height)) for i in range(count)]


def pixels_of(file: Path, count: int) -> Tensor:
    """Return the images of a shard's strip, (B, 3, H, W) uint8."""
    images = [torch.from_numpy(np.array(image)) for image in cut(file, count)]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def strip(pixels: Tensor) -> Image.Image:
    """Return images (B, 3, H, W) uint8 side by side as one."""
    row = torch.cat(list(pixels), dim=-1).permute(1, 2, 0).contiguous()
    return Image.fromarray(row.numpy())

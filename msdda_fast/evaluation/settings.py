# SPDX-License-Identifier: Apache-2.0
"""Settings of a results folder, which must not mix results of different settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msdda_fast.errors import MSDDAError
from msdda_fast.files import write_atomically
from msdda_fast.pipelines import MSDDAPipeline

__all__ = ["SettingsConflict", "bind_settings", "model_checksum", "model_settings", "write_json"]


class SettingsConflict(MSDDAError, ValueError):
    """A folder holds results of other settings."""


def bind_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write `settings` to `settings.json` in a new folder, or compare them with those stored.

    Args:
        folder: Created if missing.
        settings: JSON values; everything that a result depends on and its file name omits.

    Raises:
        SettingsConflict: The folder was made with other settings; the message names them.
    """
    record = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    if not record.exists():
        write_json(record, wanted)
        return
    stored = json.loads(record.read_text("utf-8"))
    differ = [
        f"{key} was {stored.get(key)!r}, is {wanted.get(key)!r}"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key)
    ]
    if differ:
        raise SettingsConflict(
            f"{folder} holds results of other settings ({'; '.join(differ)}); "
            "use these settings again, or another folder"
        )


def model_settings(pipe: MSDDAPipeline) -> dict[str, Any]:
    """Return everything about the model that an image depends on."""
    return {
        "model": model_checksum(pipe),
        "dtype": str(pipe.unet.dtype),
        "scheduler": {key: str(value) for key, value in pipe.scheduler.config.items()},
        "objectives": {
            name: {"eta": o.eta, "scale": o.scale, "guidance_scale": o.guidance_scale}
            for name, o in pipe.objectives.items()
        },
    }


def model_checksum(pipe: MSDDAPipeline) -> str:
    """Return the SHA-256 over the weights of every network, adapters included."""
    digest = hashlib.sha256()
    networks = [v.network for v in pipe.variants.values() if v.network is not pipe.unet]
    for module in (*pipe.components.values(), *networks):
        if isinstance(module, nn.Module):
            for name, parameter in module.named_parameters():
                digest.update(f"{name} {tuple(parameter.shape)}".encode())
                flat = parameter.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_json(file: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(file, lambda partial: partial.write_text(text, "utf-8"))

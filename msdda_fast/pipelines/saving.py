# SPDX-License-Identifier: Apache-2.0
"""Write a pipeline as a stock folder plus `objectives.json`, completely or not at all."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from msdda_fast.adapters.injection import extract
from msdda_fast.adapters.switching import adapter_names
from msdda_fast.adapters.variant import Variant
from msdda_fast.objective import Objective
from msdda_fast.pipelines.manifest import OBJECTIVES_FILE, dump_objectives

__all__ = ["save"]

#: Written last: a folder with an index has everything the index lists.
_INDICES = (OBJECTIVES_FILE, "model_index.json")


class Savable(Protocol):
    """The parts of a Stable Diffusion pipeline that saving needs."""

    unet: Any
    text_encoder: Any
    scheduler: Any
    config: Any

    @property
    def components(self) -> Mapping[str, Any]:
        """Modules by name."""

    @property
    def objectives(self) -> Mapping[str, Objective]:
        """The objectives by name, in order."""

    @property
    def variants(self) -> Mapping[str, Variant]:
        """The network and the active adapter of each objective."""


def save(pipe: Savable, folder: Path, **options: Any) -> None:  # noqa: ANN401 - diffusers' own
    """Write a folder that stock diffusers loads, with the objectives beside it.

    Everything is written next to the folder first, so a failed save does not change it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    stage.mkdir()
    try:
        _write(pipe, stage, options)
        _move(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write(pipe: Savable, stage: Path, options: dict[str, Any]) -> None:
    stock = StableDiffusionPipeline(
        **{
            **pipe.components,
            "scheduler": copy.deepcopy(pipe.scheduler),  # construction may edit its config
            "unet": _without_adapters(pipe.unet),
            "text_encoder": _without_adapters(pipe.text_encoder),
        },
        requires_safety_checker=False,
    )
    stock.register_to_config(requires_safety_checker=pipe.config.requires_safety_checker)
    stock.save_pretrained(stage, **options)
    places = {}
    folders = _folders(pipe.variants)
    for name, variant in pipe.variants.items():
        place = f"objectives/{folders[name]}"
        if variant.network is not pipe.unet:
            variant.network.save_pretrained(stage / place)
            places[name] = place
        elif variant.adapter is not None:
            _write_adapter(pipe, variant.adapter, stage / place)
            places[name] = place
    (stage / OBJECTIVES_FILE).write_text(dump_objectives(pipe.objectives, places), "utf-8")


def _folders(names: Iterable[str]) -> dict[str, str]:
    """Return a folder for each objective: its name, where every file system takes that."""
    folders: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)[:64]
        folder, count = plain, 1
        while folder.casefold() in taken:
            count += 1
            folder = f"{plain}-{count}"
        taken.add(folder.casefold())
        folders[name] = folder
    return folders


def _without_adapters(network: nn.Module | None) -> nn.Module | None:
    """Return a network with the same weights (shared, not copied) and no adapters."""
    if not adapter_names(network):
        return network
    assert network is not None
    weights = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in network.state_dict().items()
        if ".lora_" not in key
    }
    make = getattr(type(network), "from_config", type(network))  # diffusers; transformers
    with torch.device("meta"):
        bare: nn.Module = make(network.config)
    bare.load_state_dict(weights, assign=True)
    return bare


def _write_adapter(pipe: Savable, adapter: str, folder: Path) -> None:
    layers: dict[str, Any] = {}
    for part in ("unet", "text_encoder"):
        network = getattr(pipe, part)
        if adapter in adapter_names(network):
            state, config = extract(network, adapter)
            layers[f"{part}_lora_layers"] = state
            layers[f"{part}_lora_adapter_metadata"] = config
    StableDiffusionPipeline.save_lora_weights(folder, **layers)


def _move(stage: Path, folder: Path) -> None:
    """Move the staged files into place, each atomically, the indices last."""
    if not folder.exists():
        os.replace(stage, folder)
        return
    files = [file.relative_to(stage) for file in stage.rglob("*") if file.is_file()]
    for file in sorted(
        files, key=lambda file: _INDICES.index(str(file)) if str(file) in _INDICES else -1
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, folder / file)
